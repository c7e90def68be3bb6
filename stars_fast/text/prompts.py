"""Turns every accepted form of prompt into token ids, and remembers what the caller wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from stars_fast.notices import warn

Messages = list[dict[str, str]]


@dataclass
class Prompt:
    """One prompt: what the caller gave (text, chat messages or ids) and the policy's token ids."""

    source: str | Messages | list[int]
    ids: list[int]


def read_prompts(prompts: Any, tokenizer: Any, attention_mask: Any = None, name: str = "prompts") -> list[Prompt]:
    """Normalise ``prompts``.

    Parameters
    ----------
    prompts : str, list of str, list of chat message lists, one chat message list, list of id lists, id tensor, or
        what a tokenizer returns
        A 2-D tensor or array takes ``attention_mask`` of the same shape to mark padding, on either side. A tokenizer's
        output brings its own, unless another one is given.
    tokenizer : transformers tokenizer, optional
        Needed for text and chats.
    name : str
        What error messages call the argument.

    Raises
    ------
    TypeError, ValueError
        For a form that is not known, text without a tokenizer, or an empty prompt, naming the prompt's index.
    """
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        prompts, attention_mask = _read_encoding(prompts, attention_mask)
    if isinstance(prompts, np.ndarray):
        prompts = torch.tensor(prompts.copy()) if prompts.dtype.kind in "biuf" else prompts.tolist()
    if isinstance(prompts, torch.Tensor):
        return _read_tensor(prompts, _as_mask(attention_mask), getattr(tokenizer, "pad_token_id", None), name)
    if attention_mask is not None:
        raise ValueError(f"attention_mask goes with an id tensor; {name} is a {type(prompts).__name__}")
    if isinstance(prompts, str) or _is_chat(prompts):
        prompts = [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        keys = f" with the keys {list(prompts)}" if isinstance(prompts, Mapping) else ""
        raise TypeError(
            f"{name} is a {type(prompts).__name__}{keys}: give text, chat messages, id lists, an id tensor or what a "
            "tokenizer returns"
        )
    return [_read_one(f"{name}[{index}]", prompt, tokenizer) for index, prompt in enumerate(prompts)]


def read_personas(
    prompts: Sequence[Prompt], preferences: Sequence[Any], tokenizer: Any, bos_token_id: int | None = None
) -> list[list[list[int]]]:
    """Ids of every prompt under each of the preferences.

    It is put before text; into the system message of a chat, before what that says; and before ids, but behind a BOS.

    Raises
    ------
    TypeError
        For a preference in words before a prompt of ids, or the other way round.
    """
    return [
        [_under(f"prompts[{index}]", prompt, preference, tokenizer, bos_token_id) for preference in preferences]
        for index, prompt in enumerate(prompts)
    ]


def _under(name: str, prompt: Prompt, preference: Any, tokenizer: Any, bos_token_id: int | None) -> list[int]:
    source = prompt.source
    if isinstance(source, str) and isinstance(preference, str):
        return _read_one(name, preference + source, tokenizer).ids
    if _is_chat(source) and isinstance(preference, str):
        return _read_one(name, _with_system(preference, source), tokenizer).ids
    if isinstance(preference, str) or not isinstance(source, list) or _is_chat(source):
        raise TypeError(
            f"{name} and the preference {preference!r:.80} differ in form: a preference in words goes with text and "
            "chats, ids with a prompt of ids"
        )
    start = int(prompt.ids[0] == bos_token_id)
    return [*prompt.ids[:start], *map(int, preference), *prompt.ids[start:]]


def _with_system(preference: str, chat: Any) -> Messages:
    """The chat with the preference in its system message: templates take one, and at the beginning."""
    first, rest = (chat[0], chat[1:]) if chat[0].get("role") == "system" else (None, chat)
    content = preference if first is None else f"{preference}\n\n{first['content']}"
    return [{"role": "system", "content": content}, *rest]


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(turn, dict) for turn in prompt)


def _as_mask(attention_mask: Any) -> torch.Tensor | None:
    try:
        return None if attention_mask is None else torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"attention_mask={attention_mask!r:.80} is no tensor of 0 and 1 [batch, length]") from error


def ends_with_answer(prompt: Any) -> bool:
    """Whether a prompt is a chat whose last turn is the assistant's: the completion goes on from there."""
    return _is_chat(prompt) and prompt[-1].get("role") == "assistant"


def _read_encoding(encoding: Mapping[str, Any], given: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
    """The ids of what a tokenizer returns, and the mask that goes with a tensor of them; lists lose their padding."""
    ids, mask = encoding["input_ids"], encoding.get("attention_mask")
    if isinstance(ids, torch.Tensor):
        return ids, mask if given is None else given
    if len(ids) == 0 or isinstance(ids[0], Integral):  # of one text
        ids, mask = [ids], None if mask is None else [mask]
    if mask is None:
        return list(ids), given
    rows = zip(ids, mask, strict=True)
    return [[token for token, keep in zip(row, kept, strict=True) if keep] for row, kept in rows], given


def _read_tensor(
    prompts: torch.Tensor, attention_mask: torch.Tensor | None, pad_token_id: int | None, name: str
) -> list[Prompt]:
    if prompts.dtype.is_floating_point or prompts.dtype == torch.bool or prompts.dim() not in (1, 2):
        raise TypeError(
            f"{name} is a {prompts.dtype} tensor of {prompts.dim()} dimensions: give integer ids [batch, length]"
        )
    ids = prompts if prompts.dim() == 2 else prompts[None]
    if attention_mask is None and pad_token_id is not None and _looks_padded(ids, pad_token_id):
        warn(
            f"{name}: some rows begin or end with the pad token {pad_token_id} more often than others, and there is no "
            "attention_mask: if that is padding, it is read as text"
        )
    mask = torch.ones_like(ids) if attention_mask is None else torch.atleast_2d(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, {name} {tuple(ids.shape)}: they must agree")
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    return [Prompt(row, _not_empty(f"{name}[{index}]", row)) for index, row in enumerate(rows)]


def _looks_padded(ids: torch.Tensor, pad_token_id: int) -> bool:
    """Whether rows differ in how many pad tokens they begin or end with. All may begin with one that is the BOS too."""
    text = (ids != pad_token_id).long()
    return any(len((side.cumsum(1) == 0).sum(1).unique()) > 1 for side in (text, text.flip(1)))


def _read_one(name: str, prompt: Any, tokenizer: Any) -> Prompt:
    if isinstance(prompt, str):
        _need_tokenizer(name, "text", tokenizer)
        # One beginning-of-sequence token: text that a chat template wrote may have it already.
        begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = tokenizer(prompt, add_special_tokens=not begun)["input_ids"] if prompt else []
        return Prompt(prompt, _not_empty(name, list(ids)))
    if _is_chat(prompt):
        for turn in prompt:
            if "role" not in turn:
                raise ValueError(
                    f"{name} is no chat: a turn has the keys {list(turn)}, but no 'role' (of a data set's rows, give "
                    "the column that holds the prompts)"
                )
        _need_tokenizer(name, "a chat", tokenizer)
        begun = ends_with_answer(prompt)
        form = {"continue_final_message": begun, "add_generation_prompt": not begun}
        try:
            ids = tokenizer.apply_chat_template(prompt, **form, tokenize=True, return_dict=False)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"{name} does not fit the tokenizer's chat template: {error}") from error
        return Prompt([dict(turn) for turn in prompt], _not_empty(name, list(ids)))
    if isinstance(prompt, (torch.Tensor, np.ndarray)) and prompt.ndim == 1:
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if any(isinstance(token, bool) or not isinstance(token, Integral) for token in prompt):
            raise TypeError(f"{name} is neither text, nor chat messages, nor a list of token ids: {prompt!r:.80}")
        ids = [int(token) for token in prompt]
        return Prompt(ids, _not_empty(name, ids))
    raise TypeError(f"{name} is a {type(prompt).__name__}: give text, chat messages or token ids")


def _need_tokenizer(name: str, what: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError(f"{name} is {what}, but there is no tokenizer: pass tokenizer=, or token ids")


def _not_empty(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise ValueError(f"{name} is empty: a prompt has at least one token")
    return ids
