"""What requests look like: checked strictly, and described in ``/openapi.json``."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from stars_fast.methods.numbers import MOST

# What one request may ask for, beyond which a typing error would keep a GPU busy for hours.
MOST_ANSWERS = 128
MOST_ATTEMPTS = 1024
MOST_PROMPTS = 256
MOST_CANDIDATES = 2**16  # of all answers together, for a segment or a whole answer, as the method has it
MOST_STOPS = 64
MOST_KEYS = 100  # of an object: each that is wrong is complained of
MOST_PARTS = 2**14  # of a chat, its messages counted: a body that has room for pictures has room for a million
_MOST_SECONDS = 86_400.0
_EXACT = 2**53 - 1  # JSON's numbers are doubles to many clients


def _whole(value: Any) -> Any:
    """1.0 is an integer in JSON, and languages with one kind of number write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=-_EXACT, le=_EXACT)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST)]
Words = Annotated[str, Field(min_length=1)]
StopWord = Annotated[str, Field(min_length=1, max_length=1024)]
Id = Annotated[int, Field(ge=0, le=MOST)]
# One complaint is enough: a body may hold a hundred thousand.
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Texts = Annotated[list[Words], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
Parameter = Annotated[float, Field(ge=-MOST_ATTEMPTS, le=MOST_ATTEMPTS)]
IntegerParameter = Annotated[int, Field(ge=-MOST_ATTEMPTS, le=MOST_ATTEMPTS)]


class Strict(BaseModel):
    """No conversions: 0 is not False, "1" is not 1. Keys that are not known are let through, but not any number."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, json_schema_extra={"maxProperties": MOST_KEYS}
    )

    @model_validator(mode="before")
    @classmethod
    def _check_size(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_KEYS:
            raise PydanticCustomError(
                "too_many_keys", "has {count} keys, more than {most}", {"count": len(value), "most": MOST_KEYS}
            )
        return value


class MethodSettings(Strict):
    """A method by name, with parameters of its own. Numbers only: a path would be read on the server's machine."""

    __pydantic_extra__: dict[str, bool | IntegerParameter | Parameter | None] = Field(init=False)
    name: Words


class StarsSettings(Strict):
    """Fields of StarsConfig that OpenAI's API has no name for."""

    model_config = ConfigDict(extra="forbid")
    target_reward: float | None = None
    base_reward: float | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    beta: Annotated[float, Field(gt=0)] | None = None
    acceptance: Annotated[float, Field(gt=0, lt=1)] | None = None
    segment_length: Count | None = None
    max_attempts: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_ATTEMPTS)] | None = None
    candidates: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_ATTEMPTS)] | Literal["auto"] | None = None
    finished_threshold: Literal["target", "ramp"] | None = None
    method: Words | MethodSettings | None = None
    trace: bool = Field(False, description="Put every segment, with its candidates, beside the choice.")


class StreamOptions(Strict):
    include_usage: bool | None = None


class Asked(Strict):
    """What completions and chats have in common."""

    model: str | None = None
    max_tokens: Count | None = None
    n: Annotated[int, BeforeValidator(_whole), Field(ge=1, le=MOST_ANSWERS)] | None = None
    seed: Whole | None = None
    stop: StopWord | Annotated[list[StopWord], Field(fail_fast=True, max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, BeforeValidator(_whole), Field(ge=-1, le=MOST, description="-1 and 0: off.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    ignore_eos: bool | None = None
    priority: Annotated[Whole, Field(description="Lower is let in first.")] | None = None
    timeout: Annotated[float, Field(gt=0, le=_MOST_SECONDS, description="Seconds.")] | None = None
    stars: StarsSettings | None = None

    @property
    def longest(self) -> int | None:
        """Most tokens of an answer, where the request says so."""
        return self.max_tokens

    @cached_property
    def prompts(self) -> list[Any]:
        """What is to be answered, each by itself."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        return self.n or 1

    @property
    def traced(self) -> bool:
        return self.stars is not None and self.stars.trace


class CompletionRequest(Asked):
    prompt: Words | Ids | Texts | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]

    @cached_property
    def prompts(self) -> list[Any]:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: Annotated[Words, Field(description="data:image/png;base64,...; or a file of the server's folder.")]


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """What else one holds (a name, calls of tools) is refused where it says something: see refused.py."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True, min_length=1)]


class ChatRequest(Asked):
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_parts(cls, value: Any) -> Any:
        messages = value.get("messages") if isinstance(value, dict) else None
        if isinstance(messages, list):
            contents = [message.get("content") for message in messages if isinstance(message, dict)]
            count = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
            if count > MOST_PARTS:
                told = {"count": count, "most": MOST_PARTS}
                raise PydanticCustomError("too_many_parts", "has {count} messages and parts, more than {most}", told)
        return value

    @property
    def longest(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @cached_property
    def pictures(self) -> list[str]:
        """Where there are any."""
        return [
            f"messages[{place}].content[{number}]"
            for place, message in enumerate(self.messages)
            for number, part in enumerate(() if isinstance(message.content, str) else message.content)
            if isinstance(part, ImagePart)
        ]

    @cached_property
    def prompts(self) -> list[Any]:
        return [[message.model_dump(include={"role", "content"}) for message in self.messages]]


# What to write where a value fits none of several forms; pydantic complains once for each of them.
FORMS = {
    "prompt": f"give text, token ids, or a list of at most {MOST_PROMPTS} texts or lists of ids",
    "stop": f"give text, or a list of at most {MOST_STOPS} texts, none of them empty or longer than 1024 characters",
    "content": 'give text, or a list of parts {"type": "text", "text": ...} and {"type": "image_url", "image_url": '
    '{"url": "data:image/png;base64,..."}}; sounds are not read',
    "method": 'give the name of a method, or {"name": ..., and its parameters, which are numbers from '
    f"-{MOST_ATTEMPTS} to {MOST_ATTEMPTS} here}}",
    "candidates": f'give an integer from 1 to {MOST_ATTEMPTS}, or "auto"',
}
