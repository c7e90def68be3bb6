"""Errors as OpenAI's clients read them: one line that names parameter, value and limit, and gives nothing away."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from starlette.responses import Response

from stars_fast.methods.numbers import shown
from stars_fast.serve.schema import FORMS, Asked, ChatRequest, CompletionRequest, StarsSettings

_TYPES = {
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "TimeoutError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_LONGEST = 500  # characters
_KINDS = ((dict, "an object"), (list, "a list"), (str, "text"), (bool, "a truth value"), ((int, float), "a number"))
# Absolute paths, wherever they came from: a tokenizer's or a template's complaint may name files.
_PATH = re.compile(r"(?<![\w/.:])(?:[A-Za-z]:)?[/\\](?:[^\s'\"()<>,;:]+[/\\])+[^\s'\"()<>,;:]*")
# What the engine calls things, and what a request does.
_NAMES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n", "stop_strings": "stop"}
_ANEW = "make one anew with stars_fast.fit(engine, prompts)"  # which whoever asks cannot
_OURS = re.compile(rf"\b({'|'.join(_NAMES)})\b")


class Refusal(Exception):
    """Becomes the answer to a request.

    Parameters
    ----------
    message : str
    status : int
        Of HTTP.
    param : str, optional
        The parameter at fault.
    headers : mapping, optional
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.headers = message, status, param, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> Json:
        return Json(self.body, self.status, headers=dict(self.headers or {}))


def unavailable(message: str) -> Refusal:
    """Worth another try in a moment."""
    return Refusal(message, 503, headers={"Retry-After": "1"})


def failed(kind: str | None) -> Refusal:
    """The reward or the models failed. What they said may quote another caller's text: the log has it."""
    return Refusal(f"the request failed{'' if kind is None else f': {kind}'}; the server's log says more", 500)


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    """As ASCII: many clients cut lines at characters that only Unicode takes for line breaks."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def in_terms_of_requests(message: str) -> str:
    """A message of the engine's as of a request, on one line, without paths and not too long."""
    words = _PATH.sub("<path>", " ".join(message.split()))
    words = _OURS.sub(lambda match: _NAMES[match[1]], words.replace("prompts[0]", "prompt"))
    words = words.replace(_ANEW, 'stars: {"target_reward": ...}, which needs none')
    return words if len(words) <= _LONGEST else words[:_LONGEST] + " ..."


def named(message: str) -> str | None:
    """The parameter that a message begins with, where it is one of a request's."""
    first = re.match(r"\w+", message)
    name = "" if first is None else first[0]
    if name in StarsSettings.model_fields:
        return f"stars.{name}"
    return name if name in {*CompletionRequest.model_fields, *ChatRequest.model_fields} else None


def invalid(errors: Sequence[Mapping[str, Any]], body: Any) -> Refusal:
    """What pydantic found, as one line about the most telling of its complaints."""
    first = max(errors, key=lambda error: len(_place(error, body)), default=None)
    if first is None:
        return Refusal("the request is invalid")
    place = _place(first, body)
    if first["type"] == "json_invalid":
        return Refusal(f"the body is not JSON: {first['ctx']['error']} (character {first['loc'][1]})")
    if first["type"] in ("too_many_keys", "too_many_parts"):
        return Refusal(f"{'.'.join(map(str, place)) or 'the body'} {first['msg']}")
    if not place:
        return Refusal("the body must be a JSON object, sent with content-type: application/json")
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")[:80]
    return Refusal(in_terms_of_requests(_complaint(first, path, place, errors)), param=path)


def _complaint(error: Mapping[str, Any], path: str, place: Sequence[Any], errors: Sequence[Mapping[str, Any]]) -> str:
    if error["type"] in ("missing", "union_tag_not_found"):
        return f"{path} is missing"
    if error["type"] == "extra_forbidden":
        return _unknown(str(place[-1]))
    form = next((FORMS[part] for part in reversed(place) if part in FORMS), None)
    if form is not None and len(errors) > 1:
        value = error["ctx"]["tag"] if error["type"] == "union_tag_invalid" else error.get("input")
        told = f"={shown(value)}" if place[-1] == "type" else f" is {'empty' if value in ('', []) else _kind(value)}"
        return f"{path}{told}: {form}"
    if error["type"] == "too_short":
        return f"{path} is empty"
    value = error.get("input")
    told = f"={shown(value)}" if isinstance(value, (bool, int, float, type(None))) else f" is {_kind(value)}:"
    return f"{path}{told} {error['msg'].replace('Input should', 'must', 1)}"


def _unknown(name: str) -> str:
    known = StarsSettings.model_fields
    if name in Asked.model_fields:
        hint = f"give {name} beside stars, not in it"
    else:
        meant = get_close_matches(name, list(known), 1) if len(name) <= 40 else []  # of a long one it takes long
        hint = (f"did you mean {meant[0]!r}? " if meant else "") + f"there are {', '.join(known)}"
    return f"stars.{name:.40} is no setting: {hint}"


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "null")


def _place(error: Mapping[str, Any], body: Any) -> list[Any]:
    """Keys and indices that lead to the value; pydantic's names of alternatives in between are left out."""
    place, parts = list[Any](), list(error["loc"][1:])
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if isinstance(body, dict) and isinstance(part, str) and (part in body or (last and error["type"] == "missing")):
            place.append(part)
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int) and 0 <= part < len(body):
            place.append(part)
            body = body[part]
    return [*place, "type"] if error["type"].startswith("union_tag") else place
