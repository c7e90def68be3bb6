"""lm-evaluation-harness: the model ``stars-fast``, whose answers are guided.

``python -m stars_fast.integrations.lm_eval run --model stars-fast --model_args pretrained=...,reward=... --tasks ...``
is the harness's own command line with this model in it: the harness looks for no plug-ins, so that somebody has to
import this module first. In Python: ``lm_eval.simple_evaluate(StarsLM("...", "..."), tasks=[...])``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from stars_fast.names import near, with_extra

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        maybe_truncate,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from tqdm import tqdm
except ImportError as error:
    _missing = f"this needs lm-evaluation-harness: {with_extra('eval-harness')} ({error})"
    if __name__ == "__main__":
        raise SystemExit(f"error: {_missing}") from None
    raise ImportError(_missing) from error

from stars_fast import demo
from stars_fast.config import StarsConfig
from stars_fast.engine import StarsEngine
from stars_fast.inputs.functions import file_of, load_function
from stars_fast.inputs.sampling import SAMPLING_FIELDS
from stars_fast.methods.numbers import integer
from stars_fast.notices import warn
from stars_fast.outputs import StarsOutput
from stars_fast.report.files import rounded, summary, to_line

_NAME = "stars-fast"
_FIELDS = tuple(field.name for field in dataclasses.fields(StarsConfig))
_ENGINE = ("reward_tokenizer", "reward_tail", "max_rows", "kv_cache_tokens", "gpu_memory_utilization")
_READ = ("do_sample", "until", "max_gen_toks", *SAMPLING_FIELDS)  # of a task's generation_kwargs
_TOTALS = ("policy_tokens", "committed_tokens", "reward_tokens", "calibration_tokens")


class _Ask(NamedTuple):
    """One answer that is wanted."""

    place: int  # among the harness's requests
    name: dict[str, Any]  # by which it is found again: task, document, request of the document, repeat
    context: str
    ids: list[int]
    seed: int
    settings: dict[str, Any]  # of StarsConfig, which the task sets
    until: list[str]


@register_model(_NAME)
class StarsLM(HFLM):
    """A Hugging Face model of the harness whose answers are guided; its log-likelihoods are the policy's, as ``hf`` has
    them.

    Parameters
    ----------
    pretrained : str, path or transformers causal LM
        The policy: folder, hub id or "demo". Loaded by the harness, with all that its ``hf`` takes.
    reward : as StarsEngine takes it
        By name also ``FILE.py:FUNCTION``; that file is run.
    stars_config : StarsConfig, path or mapping, optional
    seed : int
        An answer draws by this, its task, document and repeat, and nothing else.
    window : int
        Most answers that are under way before the next are begun; changes no text.
    answers : path, optional
        JSON Lines to append every answer to, with its reward.
    **settings
        Fields of StarsConfig, which win over ``stars_config``; of :class:`StarsEngine` ``reward_tokenizer``,
        ``reward_tail``, ``max_rows``, ``kv_cache_tokens``, ``gpu_memory_utilization``; anything else is of ``hf``.

    Raises
    ------
    TypeError
        For a setting that is not known and looks like a misspelt one.
    """

    def __init__(
        self,
        pretrained: Any,
        reward: Any,
        *,
        stars_config: StarsConfig | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        seed: int = 0,
        window: int = 256,
        answers: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        own = {name: settings.pop(name) for name in _FIELDS if name in settings}
        engine = {name: settings.pop(name) for name in _ENGINE if name in settings}
        _check_known(settings)
        self.stars_config = _config(stars_config).replace(**own)
        named = {*own, *(stars_config if isinstance(stars_config, Mapping) else ())}
        # A whole StarsConfig does not tell what of it was given: what it has by itself is taken for not given.
        default = StarsConfig().max_new_tokens
        self._has_length = "max_new_tokens" in named or self.stars_config.max_new_tokens != default
        if self.stars_config.num_return_sequences != 1:
            raise ValueError(
                f"num_return_sequences={self.stars_config.num_return_sequences}: the harness takes one answer to a "
                "request; several are the task's `repeats`"
            )
        self.seed, self.window = integer("seed", seed), integer("window", window, 1)
        if pretrained == demo.NAME:
            pretrained = str(demo.FOLDER / "policy")
            settings.setdefault("dtype", "float32")  # the files hold half of that, to be small
        super().__init__(pretrained, **settings)
        reward = load_function(reward) if file_of(reward) is not None else reward
        placed = {"device": self.device} if isinstance(reward, (str, os.PathLike)) else {}
        self.engine = StarsEngine(self.model, reward, tokenizer=self.tokenizer, **placed, **engine)
        self.answers = None if answers is None else Path(answers)
        self._chats: dict[str, list[dict[str, str]]] = {}  # by what the policy's template made of them
        self._rewards: list[float] = []
        self._spent = Counter[str]()
        self._warned = set[str]()

    @property
    def max_gen_toks(self) -> int:
        """Length of answers to tasks that say nothing of it."""
        return self.stars_config.max_new_tokens if self._has_length else super().max_gen_toks

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raise ValueError: the harness finds cached answers by their prompt alone."""
        raise ValueError(
            "use_cache: the harness would return the answers of another reward, target, seed or repeat to the same "
            "prompt: leave it out; answers=FILE keeps answers with their rewards"
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As ``hf``; a reward model with a template of its own gets the messages, not what this makes of them."""
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        self._chats[text] = chat_history
        return text

    def get_model_info(self) -> dict[str, Any]:
        """As ``hf``, with what was spent on all answers so far and their mean reward."""
        found = {"answers": len(self._rewards), "mean_reward": rounded(fmean(self._rewards)) if self._rewards else None}
        return {**super().get_model_info(), "stars_fast": {**found, **self._spent}}

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Guided answers, in the order of the requests.

        Raises
        ------
        RuntimeError
            For the first answer that fails, naming task and document.
        """
        texts = [""] * len(requests)
        groups: dict[str, list[_Ask]] = {}
        for ask in self._asks(requests):
            key = json.dumps([ask.settings, ask.until, ask.context in self._chats])
            groups.setdefault(key, []).append(ask)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="guided answers") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.window):
                    for ask, text in self._answered(group[start : start + self.window]):
                        texts[ask.place] = text
                        bar.update()
        return texts

    def _asks(self, requests: Sequence[Any]) -> Iterator[_Ask]:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        repeats = Counter[tuple[Any, ...]]()
        for place, request in enumerate(requests):
            context, given = request.args
            asked: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(asked["until"], eos=eos)
            ids, longest = maybe_truncate(self.tok_encode(context), asked["max_gen_toks"], self.max_length)
            one = (request.task_name, request.doc_id, request.idx)
            name = dict(zip(("task", "doc_id", "idx", "repeat"), (*one, repeats[one]), strict=True))
            repeats[one] += 1  # the harness sends the same request several times
            digest = hashlib.blake2b(json.dumps([self.seed, *name.values()]).encode(), digest_size=8).digest()
            stops = [*(self.stars_config.stop_strings or ()), *(string for string in until if string and string != eos)]
            settings = {**self._sampling(asked), "max_new_tokens": longest, "stop_strings": stops or None}
            yield _Ask(place, name, context, ids, int.from_bytes(digest, "big") >> 1, settings, [*stops, eos])

    def _sampling(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a task says of sampling. Guidance has no greedy form: what asks for that is sampled all the same."""
        given = {name: asked[name] for name in SAMPLING_FIELDS if asked.get(name) is not None}
        if not asked["do_sample"] or not given.get("temperature", 1.0):
            self._warn_once(
                "a task asks for greedy decoding (do_sample: false or temperature: 0), which guidance cannot have: its "
                "answers are sampled with the settings of the model's arguments"
            )
            given = {name: value for name, value in given.items() if name == "repetition_penalty"}
        if left := sorted(name for name, value in asked.items() if value is not None and name not in _READ):
            self._warn_once(f"generation_kwargs: {', '.join(left)} have no effect on guided answers")
        return given

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def _answered(self, asks: Sequence[_Ask]) -> Iterator[tuple[_Ask, str]]:
        chats = [self._chats[ask.context] for ask in asks] if asks[0].context in self._chats else None
        out = self.engine.generate(
            [ask.ids for ask in asks],
            self.stars_config.replace(**asks[0].settings),
            reward_prompts=chats,
            seed=[ask.seed for ask in asks],
        )
        texts = [self._text(out, row, ask) for row, ask in enumerate(asks)]
        self._note(out, asks, texts)
        for ask, text, failure in zip(asks, texts, out.errors, strict=True):
            if failure is not None:
                raise RuntimeError(f"task {ask.name['task']}, document {ask.name['doc_id']}: {failure}")
            yield ask, text

    def _text(self, out: StarsOutput, row: int, ask: _Ask) -> str:
        """An answer as the harness reads it: thoughts left out, cut in front of what ends it."""
        tokens, mark = out.completions[row], self.think_end_token
        if isinstance(mark, int):
            behind = len(tokens) - tokens[::-1].index(mark) if mark in tokens else 0
            text = self.tok_decode(tokens[behind:]).lstrip() if behind else self.tok_decode(tokens)
            mark = None
        else:
            text = self.tok_decode(tokens)
        return str(postprocess_generated_text(text, ask.until, mark))

    def _note(self, out: StarsOutput, asks: Sequence[_Ask], texts: Sequence[str]) -> None:
        self._spent.update({name: out.stats[name] for name in _TOTALS})
        self._rewards += [reward for reward, failure in zip(out.rewards, out.errors, strict=True) if failure is None]
        if self.answers is None:
            return
        path = self.answers if self.world_size == 1 else self.answers.with_name(f"{self.answers.name}.{self.rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            for row, (ask, text) in enumerate(zip(asks, texts, strict=True)):
                segments = [summary(segment) for segment in out.segments[row]]
                said = {"reward": rounded(out.rewards[row]), "finish_reason": out.finish_reasons[row]}
                what = {"error": out.errors[row], "tokens": len(out.completions[row]), "segments": segments}
                file.write(to_line({**ask.name, "answer": text, **said, **what, "seed": ask.seed}))


def _config(given: Any) -> StarsConfig:
    if given is None or isinstance(given, StarsConfig):
        return given or StarsConfig()
    return StarsConfig().replace(**given) if isinstance(given, Mapping) else StarsConfig.from_pretrained(given)


def _check_known(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for what would go to the model's constructor, and was probably meant for guidance."""
    hf = inspect.signature(HFLM.__init__).parameters
    for name in settings:
        if name not in hf and (guess := near(name, (*_FIELDS, *_ENGINE))):
            raise TypeError(f"{name!r} is no argument of {_NAME}{guess}")


def main() -> None:
    """The harness's command line. With ``--output_path``, answers and rewards are logged beside its samples."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    command = HarnessCLI()
    args = command.parse_args()
    output, given = getattr(args, "output_path", None), getattr(args, "model_args", None)
    if getattr(args, "model", None) == _NAME and output and given and not given.get("answers"):
        folder = Path(output).parent if Path(output).suffix == ".json" else Path(output)
        given["answers"] = str(folder / time.strftime("answers_%Y-%m-%dT%H-%M-%S.jsonl"))
    command.execute(args)


if __name__ == "__main__":
    main()
