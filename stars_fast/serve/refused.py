"""What OpenAI's API and kindred servers have and this one has not: refused by name, since the text would be another."""

from __future__ import annotations

from typing import Any

from stars_fast.serve.errors import Refusal
from stars_fast.serve.schema import Asked, ChatRequest, StarsSettings

_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})
_ON: tuple[Any, ...] = (None, True)
_ONE: tuple[Any, ...] = (None, 1)
_GRAMMAR, _TOOLS, _TEXT = "answers cannot be held to a grammar", "there are no tool calls", "answers are text"
_LOGPROBS, _TAKEN_OUT = 'stars: {"trace": true} gives those of segments', "special tokens are left out of texts"
_BEAMS = "there is no beam search: candidates are sampled"
# By parameter: values that ask for nothing, and why others are refused or what to give instead.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "logit_bias": (_OFF, "logits are not biased"),
    "frequency_penalty": (_OFF, "give repetition_penalty"),
    "presence_penalty": (_OFF, "give repetition_penalty"),
    "tools": (_OFF, _TOOLS),
    "tool_choice": ((*_OFF, "none", "auto"), _TOOLS),
    "functions": (_OFF, _TOOLS),
    "function_call": ((*_OFF, "none", "auto"), _TOOLS),
    "response_format": ((*_OFF, {"type": "text"}), _GRAMMAR),
    "best_of": ((*_OFF, 1), 'give stars: {"method": {"name": "best_of_n", "n": ...}}'),
    "suffix": (_OFF, "text is continued, not filled in"),
    "echo": (_OFF, "the prompt is not repeated"),
    "logprobs": ((None, False), _LOGPROBS),
    "modalities": ((*_OFF, ["text"]), _TEXT),
    "length_penalty": (_ONE, _BEAMS),
    "num_beams": (_ONE, _BEAMS),
    "typical_p": (_ONE, "give top_p or min_p"),
    "tfs_z": (_ONE, "give top_p or min_p"),
    "do_sample": (_ON, "candidates are sampled"),
    "skip_special_tokens": (_ON, _TAKEN_OUT),
    "spaces_between_special_tokens": (_ON, _TAKEN_OUT),
    "detokenize": (_ON, "answers come as text"),
    "max_new_tokens": ((None,), "give max_tokens"),
    "n_predict": ((None,), "give max_tokens"),
    "reasoning_effort": ((None, "none"), "give chat_template_kwargs, with what the template calls it"),
    **dict.fromkeys(("top_logprobs", "prompt_logprobs", "top_n_tokens"), (_OFF, _LOGPROBS)),
    **dict.fromkeys(("audio", "web_search_options"), (_OFF, _TEXT)),
    **dict.fromkeys(("use_beam_search", "early_stopping"), (_OFF, _BEAMS)),
    **dict.fromkeys(("min_tokens", "min_new_tokens"), (_OFF, "answers may end at any token")),
    **dict.fromkeys(
        (
            *("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema"),
            *("guided_decoding_backend", "guided_whitespace_pattern", "grammar", "regex", "ebnf", "structural_tag"),
        ),
        (_OFF, _GRAMMAR),
    ),
    **dict.fromkeys(
        ("stop_token_ids", "stop_regex", "include_stop_str_in_output", "no_stop_trim"),
        (_OFF, "give stop, which is left out of the answer"),
    ),
    **dict.fromkeys(
        ("bad_words", "bad_words_ids", "allowed_token_ids", "no_repeat_ngram_size", "repetition_detection"),
        (_OFF, "every token may be drawn"),
    ),
    **dict.fromkeys(
        ("logits_processors", "custom_logit_processor", "custom_params", "vllm_xargs", "thinking_token_budget"),
        (_OFF, "logits are not processed further"),
    ),
    **dict.fromkeys(("mirostat", "dynatemp_range", "dry_multiplier", "xtc_probability"), (_OFF, "give top_p or min_p")),
    **dict.fromkeys(("prompt_embeds", "input_embeds", "input_ids"), (_OFF, "give prompt, as text or ids")),
    **dict.fromkeys(("multi_modal_data", "mm_processor_kwargs"), (_OFF, "give pictures in a message")),
    **dict.fromkeys(("lora", "lora_path", "lora_request"), (_OFF, "there is one model")),
    **dict.fromkeys(("session_params", "previous_response_id"), (_OFF, "nothing is kept of other requests")),
    "truncate_prompt_tokens": ((None,), "prompts are read whole"),
    "chat_template": ((None,), "the template is the policy's"),
    "documents": (_OFF, "give them in a message"),
    "prediction": (_OFF, "answers are drawn"),
}
_OF_COMPLETIONS = {"max_completion_tokens": ((None,), "give max_tokens"), "messages": (_OFF, "give prompt")}
_OF_CHATS = {"add_special_tokens": (_OFF, "the template has them"), "prompt": (_OFF, "give messages")}


def check_served(body: Asked) -> None:
    """Raise Refusal for what would change the text and is not served. Other unknown parameters are let through."""
    chat = body if isinstance(body, ChatRequest) else None
    known = {**_REFUSED, **({**_OF_COMPLETIONS, "add_special_tokens": (_ON, "they are added")} if chat is None else {})}
    if chat is not None:
        goes_on = chat.messages[-1].role == "assistant"
        last = "an assistant's" if goes_on else "not an assistant's"
        known |= _OF_CHATS
        for name, value in (("continue_final_message", goes_on), ("add_generation_prompt", not goes_on)):
            known[name] = ((None, value), f"the last message is {last}, and so it is {str(value).lower()} here")
    for name, value in (body.model_extra or {}).items():
        if name in known and value not in known[name][0]:
            raise Refusal(f"{name} is not served: {known[name][1]}", param=name)
        if name in StarsSettings.model_fields and value is not None:
            raise Refusal(f'{name} is a setting of stars: give stars: {{"{name}": ...}}', param=name)
    if chat is not None:
        _check_messages(chat)


def _check_messages(chat: ChatRequest) -> None:
    for name in ("tools", "documents"):
        if (chat.chat_template_kwargs or {}).get(name):
            param = f"chat_template_kwargs.{name}"
            raise Refusal(f"{param} is not served: {_REFUSED[name][1]}", param=param)
    for place, message in enumerate(chat.messages):
        for name, value in (message.model_extra or {}).items():
            if value not in _OFF:
                param = f"messages[{place}].{name:.40}"
                raise Refusal(f"{param} is not read: a message has a role and a content", param=param)
