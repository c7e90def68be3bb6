"""What a user sets: :class:`StarsConfig`, checked once, when it is made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from stars_fast.demo import FOLDER as DEMO_FOLDER
from stars_fast.demo import NAME as DEMO
from stars_fast.methods import METHODS, NAMED
from stars_fast.methods.base import Method, method_from
from stars_fast.methods.fit import Fit
from stars_fast.methods.numbers import MOST, MOST_ANSWERS, integer, plain, real, shown, truth
from stars_fast.names import near, refusing_unknown

CONFIG_NAME = "stars_config.json"
# Every row of a decode step holds all of them, and the text is searched for every string after each token.
_MOST_EOS, _MOST_STOP_STRINGS = 4096, 4096


# Of other libraries, and what is called otherwise here.
_ELSEWHERE = {
    "stop": "give stop_strings",
    "n": "give num_return_sequences",
    "max_tokens": "give max_new_tokens",
    "max_length": "give max_new_tokens",
    "best_of": "give method=BestOfN(n=...)",
    "logprobs": "StarsOutput.logprobs has them",
    "use_tqdm": "give progress=True to generate",
    "do_sample": "guidance always samples: leave it out",
}


def _no_field(config: type, name: str) -> str:
    known = sorted(field.name for field in dataclasses.fields(config))
    meant = f" ({_ELSEWHERE[name]})" if name in _ELSEWHERE else near(name, known)
    return f"{name!r} is not a field of StarsConfig{meant}; the fields are {', '.join(known)}"


@refusing_unknown(_no_field)
@dataclass(frozen=True)
class StarsConfig:
    """Settings of reward-guided generation. Names are transformers' where transformers has one.

    Parameters
    ----------
    segment_length : int
        Tokens per segment, K, at least 1. The last segment is shorter where ``max_new_tokens`` demands it.
    max_attempts : int
        Candidates looked at per segment before the best of them is committed (the fallback). From 1 to 2**31 - 1
        (they are counted in 32 bits), which is as good as without end: what is not used costs nothing.
    target_reward : float or sequence of float, optional
        r_star, in the reward's own units; a sequence gives one per prompt. None: calibrated per prompt from unguided
        pilot responses. ``-inf`` accepts everything (unguided sampling); ``inf`` accepts nothing, so that each
        segment is the best of ``max_attempts``. Not NaN.
    alpha : float
        Weight of r_star in the base reward ``r0 = (1 - alpha) * r(x) + alpha * r_star``, in [0, 1].
    beta : float
        Temperature of the acceptance test, > 0 and finite: a candidate is accepted with probability
        ``min(1, exp((r - tau) / beta))``. In the reward's units where ``target_reward`` is given; in units of the
        spread of the prompt's pilot rewards where it is calibrated.
    candidates : int or "auto"
        Candidates drawn side by side, at least 1. Never changes the law of the text, nor the text of a seed; clipped to
        the attempts left. "auto" follows measured times, so shapes of forward passes differ from run to run, and with
        them rounding (which may flip a token in bfloat16); a number does not.
    finished_threshold : {"target", "ramp"}
        Threshold of a candidate that ends the answer: r_star, or the ramp's value at its length.
    max_new_tokens : int
        Most tokens of a completion. Never exceeded. From 1 to 2**31 - 1 (lengths are counted in 32 bits); a call asks
        for no more than the models' positions and the free memory allow.
    temperature, top_k, top_p, min_p, repetition_penalty : optional
        Sampling of the policy. None: the model's own generation_config if it sets the field, else no effect.
        The temperature lies in [1e-6, 1e30] and the penalty in [1e-6, 1e6], so that logits divided or multiplied by
        them stay finite in float32; 1e30 is the uniform distribution. top_k is at least 0 (off), and beyond the
        vocabulary without effect; top_p lies in (0, 1], min_p in [0, 1].
    num_return_sequences : int
        Samples per prompt; their rows are adjacent in the output. From 1 to 65,536: each is a request from the start,
        of some kilobytes.
    eos_token_id : int or sequence of int, optional
        None: the model's. At most 4,096 ids, which every row holds; those of a model that lie outside its vocabulary
        are left out.
    ignore_eos : bool
        Go on to ``max_new_tokens`` whatever is sampled.
    stop_strings : str or sequence of str, optional
        A candidate ends with the token that completes one of them. Needs a tokenizer. At most 4,096: the text is
        searched for each of them after every token.
    method : str, mapping or Method
        A name (``stars_fast.methods.METHODS`` lists them), for the method's own defaults; a method object, such as
        ``ParticleFilter(particles=8)``; or a mapping of ``name`` and parameters, as files have it. A method decides
        some fields itself (docs/methods.md says which).
    base_reward : float or sequence of float, optional
        Stands in for r(x) in r0; finite. None: the reward of the empty answer, or, where the target is calibrated, what
        the pilot's first segments earned.
    acceptance : float
        Share of candidates that is to be accepted where ``target_reward`` is None, in (0, 1).
    fit : Fit, path or mapping, optional
        What :func:`stars_fast.fit` learned for this policy, reward model, segment length and sampling. "stars" and
        "cards" without a target then test quantiles and need no pilots; "optimal_stopping" knows what to expect.
        "demo": that of the demonstration models, for ``top_k=50`` and all else left open.

    Raises
    ------
    ValueError, TypeError
        For a value out of range, naming the field, the value and the limit.

    Notes
    -----
    Numbers may be any library's: Python's, numpy's, a tensor of no dimensions, Fraction, Decimal.

    Equations: STARS (arXiv 2511.03827); alpha and beta default to those of CARDS (arXiv 2406.16306) for the same rule.
    """

    segment_length: int = 16
    max_attempts: int = 20
    target_reward: float | Sequence[float] | None = None
    alpha: float = 0.5
    beta: float = 0.7
    candidates: int | str = "auto"
    finished_threshold: str = "target"
    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None
    ignore_eos: bool = False
    stop_strings: str | Sequence[str] | None = None
    method: str | Mapping[str, Any] | Method = "stars"
    base_reward: float | Sequence[float] | None = None
    acceptance: float = 0.3
    fit: Fit | str | os.PathLike[str] | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._put("segment_length", integer("segment_length", self.segment_length, 1))
        for name, most in (("max_attempts", MOST), ("max_new_tokens", MOST), ("num_return_sequences", MOST_ANSWERS)):
            self._put(name, integer(name, getattr(self, name), 1, most))
        if not isinstance(self.candidates, str):
            self._put("candidates", integer("candidates", self.candidates, 1, hint=", or 'auto'"))
        elif self.candidates != "auto":
            raise ValueError(f"candidates={shown(self.candidates)}: give an integer of at least 1, or 'auto'")
        self._put("alpha", real("alpha", self.alpha, 0.0, 1.0))
        self._put("beta", real("beta", self.beta, 0.0, open_below=True, open_above=True))
        self._put("acceptance", real("acceptance", self.acceptance, 0.0, 1.0, open_below=True, open_above=True))
        self._put("fit", _fit(self.fit))
        self._put("target_reward", _rewards("target_reward", self.target_reward))
        self._put("base_reward", _rewards("base_reward", self.base_reward, finite=True))
        if not isinstance(self.finished_threshold, str) or self.finished_threshold not in ("target", "ramp"):
            raise ValueError(f"finished_threshold={shown(self.finished_threshold)}: must be 'target' or 'ramp'")
        chosen = method_from(self.method, NAMED)
        known = METHODS.get(chosen.name) is type(chosen)
        self._put("method", chosen.name if known and not chosen.changed else chosen)
        self._check_sampling()
        self._check_stopping()

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_sampling(self) -> None:
        if self.temperature is not None:
            # Logits divided by less overflow, which looks as if the policy were broken.
            hint = "; greedy decoding (0) leaves nothing to sample from, and 1e30 is uniform"
            self._put("temperature", real("temperature", self.temperature, 1e-6, 1e30, hint=hint))
        if self.top_k is not None:
            self._put("top_k", integer("top_k", self.top_k, 0))
        if self.top_p is not None:
            self._put("top_p", real("top_p", self.top_p, 0.0, 1.0, open_below=True))
        if self.min_p is not None:
            self._put("min_p", real("min_p", self.min_p, 0.0, 1.0))
        if self.repetition_penalty is not None:
            name = "repetition_penalty"
            self._put(name, real(name, self.repetition_penalty, 1e-6, 1e6))

    def _check_stopping(self) -> None:
        self._put("ignore_eos", truth("ignore_eos", self.ignore_eos))
        eos = plain(self.eos_token_id)
        if isinstance(eos, Sequence) and not isinstance(eos, (str, bytes)):
            _check_count("eos_token_id", eos, _MOST_EOS)
            self._put("eos_token_id", tuple(integer(f"eos_token_id[{i}]", id_, 0) for i, id_ in enumerate(eos)))
        elif eos is not None:
            self._put("eos_token_id", integer("eos_token_id", eos, 0, hint=", or a sequence of them"))
        if self.stop_strings is not None:
            strings = (self.stop_strings,) if isinstance(self.stop_strings, str) else plain(self.stop_strings)
            if not _is_listed(strings):
                raise TypeError(f"stop_strings={shown(strings)}: must be a string or a sequence of strings")
            _check_count("stop_strings", strings, _MOST_STOP_STRINGS)
            for string in strings:
                if not isinstance(string, str) or not string:
                    raise ValueError(f"stop_strings: {shown(string)} is not a non-empty string")
            self._put("stop_strings", tuple(strings))

    def replace(self, **overrides: Any) -> StarsConfig:
        """A copy with some fields changed. Raises TypeError for a field that does not exist, naming it."""
        known = {field.name for field in dataclasses.fields(self)}
        for name, value in overrides.items():
            if name in known:
                continue
            method = method_from(overrides.get("method", self.method), NAMED)
            if name in (field.name for field in dataclasses.fields(method)):
                give = f"method={type(method).__name__}({name}={value!r})"
                raise TypeError(f"{name!r} is a parameter of the method, not a field of StarsConfig: give {give}")
            raise TypeError(_no_field(StarsConfig, name))
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["method"] = self.whole_method.to_dict()
        values["fit"] = None if self.known is None else self.known.to_dict()
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def known(self) -> Fit | None:
        """``fit`` as an object."""
        return cast("Fit | None", self.fit)

    @property
    def whole_method(self) -> Method:
        """``method`` as an object."""
        return method_from(self.method, NAMED)

    @property
    def chosen_method(self) -> Method:
        """What decides about candidates: ``method`` as an object, or the one that :class:`methods.Guided` is given."""
        return self.whole_method.selection

    def selecting(self, method: Method) -> StarsConfig:
        """A copy where ``method`` decides about the candidates, which are drawn as they were."""
        return self.replace(method=self.whole_method.selecting(method))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``stars_config.json`` into a folder, which is made if needed."""
        folder = _path("save_directory", save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **overrides: Any) -> StarsConfig:
        """Read what :meth:`save_pretrained` wrote: a folder, or the file itself. Overrides win over the file.

        Raises
        ------
        FileNotFoundError, ValueError, TypeError
            Without that file; for one that is no JSON object of fields, or a value out of range, naming the file.
        """
        path = _path("pretrained_model_name_or_path", pretrained_model_name_or_path)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no {CONFIG_NAME} at {path}")
        try:
            values = json.loads(path.read_text())
            if not isinstance(values, dict):
                raise TypeError(f"it holds a {type(values).__name__}: must be an object of StarsConfig's fields")
            config = cls().replace(**{**values, **overrides})
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}: {error}") from error
        return config


def _fit(value: Any) -> Fit | None:
    if value is None or isinstance(value, Fit):
        return value
    if isinstance(value, Mapping):
        return Fit.from_dict(value)
    if isinstance(value, (str, os.PathLike)):
        return Fit.from_pretrained(DEMO_FOLDER if value == DEMO else value)
    raise TypeError(f"fit={shown(value)}: give what stars_fast.fit returns, the path it was saved to, or 'demo'")


def _path(name: str, value: Any) -> Path:
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={shown(value)} must be a path")
    return Path(value)


def _check_count(name: str, values: Collection[Any], most: int) -> None:
    if len(values) > most:
        raise ValueError(f"{name} has {len(values)} entries: must be at most {most}")


def _is_listed(value: Any) -> bool:
    """Whether it is a collection in some order. A tensor is none by now, unless it has no data."""
    other = isinstance(value, (str, bytes, Set, Mapping)) or hasattr(value, "tolist")
    return isinstance(value, Collection) and not other


def _rewards(name: str, value: Any, finite: bool = False) -> float | tuple[float, ...] | None:
    value = plain(value)
    if value is None:
        return None
    limits: dict[str, Any] = {"open_below": finite, "open_above": finite}
    if _is_listed(value):
        return tuple(real(f"{name}[{index}]", one, **limits) for index, one in enumerate(value))
    return real(name, value, **limits, hint=", or a sequence of one number per prompt")
