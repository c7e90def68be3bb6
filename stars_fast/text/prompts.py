"""Turns every accepted form of prompt into token ids, and remembers what the caller wrote."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from numbers import Integral
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from stars_fast.methods.numbers import shown
from stars_fast.notices import warn
from stars_fast.text.media import Media, media_inputs
from stars_fast.text.pictures import chat_template, opened, processed
from stars_fast.text.template import apply
from stars_fast.text.tokens import guarded, legible, refuse_long, token_ids
from stars_fast.text.turns import check_turns, has_pictures, in_one_piece, said

Messages = list[dict[str, Any]]


@dataclass
class Prompt:
    """One prompt: what the caller gave (text, chat messages or ids) and the policy's token ids."""

    source: str | Messages | list[int]
    ids: list[int]  # with pictures: one for each slot that they take
    media: Media | None = None


# What the reader of prompts decides itself when it calls a tokenizer's apply_chat_template.
_OWN = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}
_OWN |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
_OWN |= {"tokenizer_kwargs", "sanitize_control_tokens"}


def template_kwargs(given: Any) -> dict[str, Any]:
    """Variables for chat templates, checked.

    Raises
    ------
    TypeError, ValueError
        For what is no mapping of names, or a name that is not the caller's to set.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise TypeError(
            f"chat_template_kwargs={given!r:.80} is no mapping of names to values, such as {{'enable_thinking': False}}"
        )
    if own := _OWN & given.keys():
        raise ValueError(
            f"chat_template_kwargs sets {min(own)!r}, which is not a variable of templates: give those alone, and a "
            "template as tokenizer.chat_template"
        )
    return dict(given)


def read_prompts(
    prompts: Any,
    tokenizer: Any,
    attention_mask: Any = None,
    name: str = "prompts",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_positions: int | None = None,
    processor: Any = None,
    takes: Collection[str] = (),
) -> list[Prompt]:
    """Normalise ``prompts``.

    Parameters
    ----------
    prompts : str, list of str, list of chat message lists, one chat message list, list of id lists, id tensor, what a
        tokenizer or processor returns, or a list of such, one prompt each
        A 2-D tensor or array takes ``attention_mask`` of the same shape to mark padding, on either side. A tokenizer's
        output brings its own, unless another one is given.
    tokenizer : transformers tokenizer, optional
        Needed for text and chats.
    name : str
        What error messages call the argument.
    chat_template_kwargs : mapping, optional
        Variables for the tokenizer's chat template, such as ``enable_thinking``.
    max_positions : int, optional
        The policy's. Text that is far longer is refused once its beginning has been read.
    processor : transformers processor, optional
        Needed for chats with pictures.
    takes : collection of str
        What of a processor's output the policy reads (:func:`stars_fast.text.media.forward_arguments`).

    Raises
    ------
    TypeError, ValueError
        For a form that is not known, text without a tokenizer, or an empty prompt, naming the prompt's index.
    """
    encoded = _is_encoding(prompts)
    if encoded:
        inputs = media_inputs(name, prompts, _as_mask(attention_mask), takes)
        if inputs is not None:
            return _read_media(inputs, tokenizer, name)
        prompts, attention_mask = _read_encoding(prompts, attention_mask)
    if isinstance(prompts, np.ndarray):
        prompts = torch.tensor(prompts.copy()) if prompts.dtype.kind in "biuf" else prompts.tolist()
    if isinstance(prompts, torch.Tensor):
        return _read_tensor(prompts, _as_mask(attention_mask), getattr(tokenizer, "pad_token_id", None), name)
    if attention_mask is not None:
        raise ValueError(f"attention_mask goes with an id tensor; {name} is a {type(prompts).__name__}")
    if isinstance(prompts, str) or is_chat(prompts):
        prompts = [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        keys = f" with the keys {list(prompts)}" if isinstance(prompts, Mapping) else ""
        raise TypeError(
            f"{name} is a {type(prompts).__name__}{keys}: give text, a chat, a list of texts, chats or id lists, "
            "an id tensor or what a tokenizer or processor returns"
        )
    if len(prompts) and all(isinstance(one, Integral) and not isinstance(one, bool) for one in prompts):
        raise TypeError(f"{name}={shown(prompts)} is one list of ids: give a list of them, {name}=[ids]")
    variables = template_kwargs(chat_template_kwargs)
    read = [
        read_one(f"{name}[{index}]", prompt, tokenizer, variables, max_positions, processor, takes)
        for index, prompt in enumerate(prompts)
    ]
    lists = [one.ids for one, given in zip(read, prompts, strict=True) if isinstance(given, list) and given == one.ids]
    if not encoded and len(lists) == len(read) and len(set(map(len, lists))) == 1:
        _warn_of_padding(lists, getattr(tokenizer, "pad_token_id", None), name)
    return read


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of turns; an encoding is no turn."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return all(isinstance(turn, dict) for turn in prompt) and not any(map(_is_encoding, prompt))


def _is_encoding(prompt: Any) -> bool:
    """Whether it is what a tokenizer or processor returns."""
    return isinstance(prompt, Mapping) and "input_ids" in prompt


def _as_mask(attention_mask: Any) -> torch.Tensor | None:
    try:
        return None if attention_mask is None else torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"attention_mask={attention_mask!r:.80} is no tensor of 0 and 1 [batch, length]") from error


def ends_with_answer(prompt: Any) -> bool:
    """Whether a prompt is a chat whose last turn is the assistant's: the completion goes on from there."""
    return is_chat(prompt) and prompt[-1].get("role") == "assistant"


def _read_media(inputs: Mapping[str, torch.Tensor], tokenizer: Any, name: str) -> list[Prompt]:
    """The rows of what a processor returned."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prompts = _read_tensor(ids, mask, getattr(tokenizer, "pad_token_id", None), name)
    return [replace(prompt, media=Media(inputs, row)) for row, prompt in enumerate(prompts)]


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
    if attention_mask is None:
        _warn_of_padding(ids.tolist(), pad_token_id, name)
    mask = torch.ones_like(ids) if attention_mask is None else torch.atleast_2d(attention_mask)
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, {name} {tuple(ids.shape)}: they must agree")
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
    return [Prompt(row, _not_empty(f"{name}[{index}]", row)) for index, row in enumerate(rows)]


def _warn_of_padding(rows: Sequence[Sequence[int]], pad_token_id: int | None, name: str) -> None:
    """Say it where rows of one length that have no mask differ in how many pad tokens they begin or end with. All may
    begin with one that is the BOS too.
    """
    if any(len({_pads(side(row), pad_token_id) for row in rows}) > 1 for side in (iter, reversed)):
        warn(
            f"{name}: some rows begin or end with the pad token {pad_token_id} more often than others, and there is no "
            "attention_mask: if that is padding, it is read as text (give all that the tokenizer returned, or lists of "
            "ids without padding)"
        )


def _pads(ids: Iterable[int], pad_token_id: int | None) -> int:
    """How many pad tokens come first."""
    return sum(1 for _ in takewhile(lambda token: token == pad_token_id, ids))


def read_one(
    name: str,
    prompt: Any,
    tokenizer: Any,
    variables: dict[str, Any],
    max_positions: int | None = None,
    processor: Any = None,
    takes: Collection[str] = (),
) -> Prompt:
    """One of :func:`read_prompts`, with checked ``variables``; errors begin with ``name``. What was read stays so."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        _need_tokenizer(name, "text", tokenizer)
        return Prompt(prompt, _not_empty(name, _text_ids(name, prompt, tokenizer, max_positions)))
    if is_chat(prompt):
        check_turns(name, prompt, pictures=processor is not None)
        if any(map(has_pictures, prompt)):
            return _read_pictures(name, prompt, processor, variables, max_positions, takes)
        _need_tokenizer(name, "a chat", tokenizer)
        chat = [dict(turn) for turn in prompt]
        template = None if getattr(tokenizer, "chat_template", None) else chat_template(processor)
        if template is None:
            _need_template(name, tokenizer)
        return Prompt(chat, _not_empty(name, _chat_ids(name, chat, tokenizer, variables, max_positions, template)))
    if _is_encoding(prompt):
        rows = read_prompts(prompt, tokenizer, None, name, takes=takes)
        if len(rows) != 1:
            raise ValueError(f"{name} holds {len(rows)} prompts: in a list, give one each; a batch goes alone")
        return rows[0]
    if isinstance(prompt, (torch.Tensor, np.ndarray)) and prompt.ndim == 1:
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if any(isinstance(token, bool) or not isinstance(token, Integral) for token in prompt):
            raise TypeError(f"{name} is neither text, nor chat messages, nor a list of token ids: {prompt!r:.80}")
        ids = [int(token) for token in prompt]
        return Prompt(ids, _not_empty(name, ids))
    raise TypeError(f"{name} is a {type(prompt).__name__}: give text, chat messages or token ids")


def _text_ids(name: str, text: str, tokenizer: Any, max_positions: int | None) -> list[int]:
    try:
        refuse_long(name, [text], tokenizer, max_positions, "policy")
        # One beginning-of-sequence token: text that a chat template wrote may have it already.
        begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        return token_ids(tokenizer, text, add_special_tokens=not begun) if text else []
    except ValueError as error:
        raise _named(name, error) from error


def _chat_ids(
    name: str,
    chat: Messages,
    tokenizer: Any,
    variables: dict[str, Any],
    max_positions: int | None,
    template: str | None,
) -> list[int]:
    form = {**_form(chat), "return_dict": False, "template": template}
    try:
        refuse_long(name, said(chat), tokenizer, max_positions, "policy")
        misfit = f"{name} does not fit the tokenizer's chat template"
        return guarded(lambda: list(apply(tokenizer, chat, variables, **form, tokenize=True)), what=misfit)
    except ValueError as error:
        raise _named(name, error) from error


def _form(chat: Messages) -> dict[str, bool]:
    begun = ends_with_answer(chat)
    return {"continue_final_message": begun, "add_generation_prompt": not begun}


def _read_pictures(
    name: str,
    given: Messages,
    processor: Any,
    variables: dict[str, Any],
    max_positions: int | None,
    takes: Collection[str],
) -> Prompt:
    """A chat with pictures. Its source has bare parts in their places."""
    chat, images = opened(name, given)
    refuse_long(name, said(chat), processor.tokenizer, max_positions, "policy")
    refused = f"{name}: the processor cannot read it"
    encoding = guarded(lambda: processed(processor, chat, images, variables, **_form(chat)), what=refused)
    (prompt,) = read_prompts(encoding, processor.tokenizer, None, name, takes=takes)
    if prompt.media is None:
        raise ValueError(f"{name} has pictures, of which the processor's output ({', '.join(encoding)}) holds nothing")
    return Prompt(chat, prompt.ids, replace(prompt.media, images=images))


def _named(name: str, error: ValueError) -> ValueError:
    return error if str(error).startswith(name) else ValueError(f"{name}: {error}")


def gone_on_from(source: Any, ids: Sequence[int], tokenizer: Any) -> Any:
    """``source``, the beginning of an answer at its end as the policy's ``ids`` have it: some templates trim it."""
    if tokenizer is None or not ends_with_answer(source):
        return source
    begun = in_one_piece(source[-1]).get("content", "")
    if begun == begun.rstrip():
        return source
    end = legible(tokenizer, ids[-len(begun.encode()) - 8 :], skip_special_tokens=False)
    if end.endswith(begun) or not end.endswith(begun.rstrip()):
        return source
    return [*source[:-1], {**source[-1], "content": begun.rstrip()}]


def _need_tokenizer(name: str, what: str, tokenizer: Any) -> None:
    if tokenizer is None:
        raise ValueError(f"{name} is {what}, but there is no tokenizer: pass tokenizer=, or token ids")


def _need_template(name: str, tokenizer: Any) -> None:
    """One of transformers' own needs it; what another kind does with a chat is its business."""
    own = getattr(tokenizer.apply_chat_template, "__func__", None)
    if own is PreTrainedTokenizerBase.apply_chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"{name} is a chat, and this policy has no chat template: give text, or a tokenizer with a chat_template"
        )


def _not_empty(name: str, ids: list[int]) -> list[int]:
    if not ids:
        raise ValueError(f"{name} is empty: a prompt has at least one token")
    return ids
