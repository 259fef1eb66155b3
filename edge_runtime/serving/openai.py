"""The requests and responses of OpenAI's interface, as far as an engine can keep its word.

A field that would change an answer and is not known here is refused by name. Fields that change
nothing are passed over, and so is a known field with the value that leaves it without effect.
Source: the API reference of OpenAI, chat completions and completions.
"""

import re
import time
import uuid
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from edge_runtime.serving.answer import Finish, Question
from edge_runtime.serving.text import Language
from edge_runtime.trainer.tokens import CHARACTERS, Asked

PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
WITHOUT_EFFECT: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": False,
    "logit_bias": {},
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "tools": [],
    "tool_choice": "none",
    "modalities": ["text"],
    "response_format": {"type": "text"},
}
COMPLETION_TOKENS = 16  # of a completion that names no limit, as OpenAI has it

Count = Annotated[int, Meta(ge=1)]
StopText = Annotated[str, Meta(min_length=1, max_length=200)]
TokenIds = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
Body = TypeVar("Body", "ChatRequest", "CompletionRequest")


class RequestError(Exception):
    """A request that is refused, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def templated(self) -> dict[str, str]:
        """The turn as a chat template takes it."""
        parts = self.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=16)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


class ChatRequest(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[Turn], Meta(min_length=1)]
    max_completion_tokens: Count | None = None


class CompletionRequest(_Common, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A request to /v1/completions."""

    prompt: str | list[Any]


def read(body: bytes, kind: type[Body]) -> Body:
    """The request in a body; raises RequestError naming the field."""
    try:
        fields = _without_null(msgspec.json.decode(body))
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(400, "the body is not a JSON object")
    for name in fields.keys() & WITHOUT_EFFECT.keys():
        seen, needed = fields[name], WITHOUT_EFFECT[name]
        # in Python False is 0, but as a number of logprobs 0 has an effect
        if seen != needed or isinstance(seen, bool) != isinstance(needed, bool):
            raise RequestError(
                400,
                f"`{name}` is {str(seen)[:80]}, but is supported as {needed} alone: leave it out",
                name,
                "unsupported_value",
            )
    rest = {name: value for name, value in fields.items() if name not in PASSED_OVER | WITHOUT_EFFECT.keys()}
    for name in rest.keys() - set(kind.__struct_fields__):
        raise RequestError(
            400, f"`{name[:80]}` is not supported: leave it out", name[:80], "unsupported_parameter"
        )
    try:
        return msgspec.convert(rest, kind)
    except msgspec.ValidationError as error:
        place = re.search(r"\$\.(\w+)|required field `(\w+)`", str(error))
        raise RequestError(400, str(error), next(filter(None, place.groups())) if place else None) from error


def _without_null(value: Any) -> Any:
    """JSON without the fields that are null: they are as good as left out."""
    if isinstance(value, dict):
        return {name: _without_null(each) for name, each in value.items() if each is not None}
    return [_without_null(each) for each in value] if isinstance(value, list) else value


def question(
    request: ChatRequest | CompletionRequest, language: Language, context: int, vocabulary: int
) -> Question:
    """The question that a request asks.

    Args:
        language: of the model.
        context: tokens that prompt and answer may have together.
        vocabulary: token ids are below this.

    Raises:
        RequestError: prompt and answer do not fit the context, or the prompt is empty.
        InputError: the model's chat template refuses the messages.
    """
    if isinstance(request, ChatRequest):
        turns = [turn.templated() for turn in request.messages]
        _require_room([turn["content"] for turn in turns], context, "messages")
        ids, spaces = language.chat(turns)
        most = request.max_completion_tokens or request.max_tokens or max(context - len(ids), 1)
        where = "messages"
    else:
        ids, spaces = _asked(request.prompt, language, context, vocabulary)
        most, where = request.max_tokens or COMPLETION_TOKENS, "prompt"
    if not ids:
        raise RequestError(400, "the prompt is empty", where)
    if len(ids) + most > context:
        raise RequestError(
            400,
            f"the prompt has {len(ids)} tokens and the answer may have {most}, but the context has {context} for "
            "both: shorten the prompt or ask for fewer tokens",
            where,
            "context_length_exceeded",
        )
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    # of any whole number, as a seed is not negative here
    seed = None if request.seed is None else request.seed % (1 << 64)
    return Question(ids, most, request.temperature, request.top_p, seed, tuple(stop), spaces)


def _require_room(texts: list[str], context: int, where: str) -> None:
    """Refuse, before it is tokenized, a prompt that is too long whatever its tokens are."""
    characters = sum(map(len, texts))
    # each turn of a chat has a token at least
    if characters > CHARACTERS * context or len(texts) > context:
        raise RequestError(
            400,
            f"the prompt has {characters} characters in {len(texts)} texts, which cannot fit the context of {context} "
            "tokens: shorten the prompt",
            where,
            "context_length_exceeded",
        )


def _asked(prompt: str | list[Any], language: Language, context: int, vocabulary: int) -> Asked:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        (prompt,) = prompt
    if isinstance(prompt, str):
        _require_room([prompt], context, "prompt")
        return language.prompt(prompt)
    try:
        ids = msgspec.convert(prompt, TokenIds)
    except msgspec.ValidationError as error:
        raise RequestError(
            400, "`prompt` has to be a text or its token ids; one prompt a request", "prompt"
        ) from error
    if max(ids) >= vocabulary:
        raise RequestError(
            400, f"`prompt` has the token {max(ids)}, but the model has {vocabulary}", "prompt"
        )
    return Asked(ids, "")


class Reply(NamedTuple):
    """What the parts of one response have in common."""

    id: str
    created: int  # seconds since 1970
    model: str
    chat: bool

    def whole(self, text: str, finish: Finish, prompt: int, tokens: int, version: int) -> dict[str, Any]:
        """The response that is not streamed. prompt and tokens: their numbers of tokens."""
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        name = "chat.completion" if self.chat else "text_completion"
        return self._object(name, [choice], version) | {"usage": usage(prompt, tokens)}

    def part(
        self, text: str | None, finish: Finish | None, version: int, *, first: bool = False
    ) -> dict[str, Any]:
        """A part of a streamed response. first: of a chat, the part that names the role."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        content: dict[str, Any] = {"delta": delta} if self.chat else {"text": text or ""}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion.chunk" if self.chat else "text_completion", [choice], version)

    def last(self, prompt: int, tokens: int, version: int) -> dict[str, Any]:
        """The part with the numbers of tokens, which a client asks for."""
        name = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(name, [], version) | {"usage": usage(prompt, tokens)}

    def _object(self, name: str, choices: list[dict[str, Any]], version: int) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"version-{version}",
            "choices": choices,
        }


def reply(model: str, *, chat: bool) -> Reply:
    """A response that begins now."""
    return Reply(f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time()), model, chat)


def usage(prompt: int, tokens: int) -> dict[str, int]:
    """Numbers of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
