"""What ``stars-fast doctor`` finds out about a policy and a reward model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from stars_fast.cli.console import one_line

if TYPE_CHECKING:
    from stars_fast.policy.policy import Policy
    from stars_fast.rewards.classifier import ClassifierReward
    from stars_fast.tree.model import TreeModel

PROMPT, ANSWER = "Name three fruits.", "Apples, pears and plums."
_ROOM_FOR = 1024  # tokens of an answer with its prompt
_SHOWN = 600  # characters of a rendered text
_UTILIZATION = 0.9  # of a GPU, as an engine's default

Report = dict[str, Any]


def examine_pair(policy: Policy, scorer: ClassifierReward, tokenizer: Any, reads: str) -> Report:
    """Tokenizers, one text as the reward model sees it, its score computed twice, and memory.

    Parameters
    ----------
    policy : Policy
    scorer : ClassifierReward
        Checked against the policy.
    tokenizer : transformers tokenizer, optional
        The policy's; without one the text is some ids.
    reads : str
        Whose ids the reward model reads, in words.
    """
    report: Report = {"tokenizers": {"policy": _named(tokenizer), "reward": _named(scorer.tokenizer), "why": reads}}
    try:
        report |= _scored_twice(policy, scorer, tokenizer)
    except (ValueError, TypeError, NotImplementedError) as error:
        report["error"] = one_line(error)
    return report | {"memory": _memory([policy, *scorer.tree_models], [policy.model, scorer.model])}


def trouble(report: Report) -> str:
    """What is wrong with a pair, in a line; empty where nothing is."""
    if "error" in report:
        return f"the reward model cannot score what the policy writes: {report['error']}"
    score = report["score"]
    if score["agrees"]:
        return ""
    return (
        f"the engine gives a text the reward {score['engine']:.6g} and a plain forward pass {score['plain']:.6g}, more "
        "than rounding explains: do not use this pair, and please report it"
    )


def pair_words(report: Report) -> dict[str, Any]:
    """The report, line by line."""
    told = report["tokenizers"]
    both = f"{told['policy']}; the reward model: {told['reward']}"
    words: dict[str, Any] = {"tokenizers": f"{both}; it reads {told['why']}"}
    if "score" in report:
        score, card = report["score"], report["whole"]
        words["it sees"] = repr(report["seen"]) + ("" if report["tail"] else ", no tail")
        if report["tail"]:
            words["tail"] = f"{report['tail']!r}, rolled back after each score"
        verdict = "equal within rounding" if score["agrees"] else "NOT EQUAL: MORE THAN ROUNDING EXPLAINS"
        words["its score"] = Text(
            f"{score['engine']:.6g} by the engine, {score['plain']:.6g} by a plain forward pass: {verdict}",
            style="" if score["agrees"] else "bold red",
        )
        if card is not None:
            found = "the same ids" if card["same"] else f"other ids, of score {card['score']:.6g},"
            words["by its tokenizer"] = Text(
                f"{found} where the whole is rendered and tokenised at once, as model cards do",
                style="" if card["same"] else "yellow",
            )
    if trouble(report):
        words["trouble"] = Text(trouble(report), style="bold red")
    return words | _memory_words(report["memory"])


def _named(tokenizer: Any) -> str:
    return "none of its own" if tokenizer is None else f"{type(tokenizer).__name__} of {len(tokenizer):,} ids"


def _scored_twice(policy: Policy, scorer: ClassifierReward, tokenizer: Any) -> Report:
    """An answer in two segments as the engine scores it, and in one plain forward pass over the same ids."""
    import torch

    from stars_fast.rewards.base import Completion, Response, RewardPrompt
    from stars_fast.rewards.classifier import score_in_full
    from stars_fast.text.chat import encode
    from stars_fast.tree.attention import evaluating, own_dtypes
    from stars_fast.tree.check import absolute_tolerance

    if tokenizer is None:
        ids = [token % min(policy.vocab_size, scorer.vocab_size) for token in range(12)]
        prompt, answer = RewardPrompt(0, ids[:6], ids[:6]), ids[6:]
    else:
        chat = bool(getattr(tokenizer, "chat_template", None))
        source: Any = [{"role": "user", "content": PROMPT}] if chat else PROMPT
        prompt = RewardPrompt(0, source, None, tokenizer=tokenizer)
        answer = encode(tokenizer, ANSWER) if chat else _going_on(tokenizer, prompt.ids)
    response, half = Response(prompt), len(answer) // 2
    with torch.no_grad(), own_dtypes():
        scorer.begin([prompt], len(answer), 1, None)
        try:
            scorer.open([prompt], len(answer))
            first = Completion(response, answer[:half], tokenizer=tokenizer)
            scorer.score([first])
            scorer.commit(first)
            response.tokens = answer[:half]
            last = Completion(response, answer[half:], finished=True, tokenizer=tokenizer)
            (text,) = scorer.texts([last])
            engine = float(scorer.score([last])[0])
        finally:
            scorer.end()
        seen = [*text.ids, *text.tail]
        with evaluating(scorer.model):
            (plain,) = score_in_full(scorer.model, [seen])
            whole = _at_once(scorer, prompt.source)
            card = None
            if whole is not None:
                score = plain if whole == seen else score_in_full(scorer.model, [whole])[0]
                card = {"same": whole == seen, "score": score, "ids": len(whole)}
    allowed = absolute_tolerance(next(scorer.model.parameters()).dtype) * max(1.0, abs(plain) / 10)
    reader = scorer.tokenizer or tokenizer
    return {
        "seen": _shown(reader, seen),
        "tail": _shown(reader, text.tail) if text.tail else "",
        "ids": len(seen),
        "score": {"engine": engine, "plain": plain, "agrees": abs(engine - plain) <= allowed},
        "whole": card,
    }


def _going_on(tokenizer: Any, prompt: list[int]) -> list[int]:
    """The answer's ids behind those of the prompt, with the space that its first word brings along."""
    from stars_fast.text.chat import encode
    from stars_fast.text.tokens import token_ids

    whole = token_ids(tokenizer, f"{PROMPT} {ANSWER}")
    return whole[len(prompt) :] if whole[: len(prompt)] == prompt else encode(tokenizer, f" {ANSWER}")


def _at_once(scorer: ClassifierReward, source: Any) -> list[int] | None:
    """Ids of question and answer as the reward model's own tokenizer, where it has one, writes them in one piece."""
    from stars_fast.text.chat import rendered
    from stars_fast.text.tokens import token_ids

    tokenizer = scorer.tokenizer
    if tokenizer is None:
        return None
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}]
        return token_ids(tokenizer, rendered(tokenizer, turns, {}), add_special_tokens=False)
    return token_ids(tokenizer, f"{PROMPT} {ANSWER}") if isinstance(source, str) else None


def _shown(tokenizer: Any, ids: list[int]) -> str:
    text = str(ids) if tokenizer is None else str(tokenizer.decode(ids))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _memory(trees: list[TreeModel], models: list[Any]) -> Report:
    """Bytes of both models' weights, and of keys and values; tokens that both trees have room for on this machine."""
    from stars_fast.report.weights import Weights
    from stars_fast.tree.memory import default_tokens, divide_devices

    rows = 64 if trees[0].device.type == "cpu" else 256  # of an engine
    divide_devices(trees, rows, _UTILIZATION, _ROOM_FOR)
    return {
        "weights_bytes": {
            role: Weights.of(model).bytes for role, model in zip(("policy", "reward"), models, strict=True)
        },
        "kv_bytes_per_token": sum(tree.bytes_per_token for tree in trees),
        "tokens": min(default_tokens(tree, 2**31, 1) for tree in trees),
    }


def _memory_words(memory: Report) -> dict[str, str]:
    policy, reward = (size / 2**20 for size in memory["weights_bytes"].values())
    room = memory["tokens"]
    return {
        "memory": f"{policy:,.0f} and {reward:,.0f} MiB of weights, {memory['kv_bytes_per_token']:,} bytes of keys and "
        "values a token of both",
        "room": f"{room:,} tokens here and now: {room // _ROOM_FOR:,} texts of {_ROOM_FOR:,} tokens at a time",
    }
