"""The requests of OpenAI's API that the server reads. What it cannot do is refused, not ignored."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
)

MOST_LIKELY = 20
"""Largest number of likeliest tokens whose log-probabilities a request may ask for."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _only(*values: Any, where: str = "this server") -> Any:
    """A field of OpenAI's that must have one of these values, or be null."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            shown = ", ".join(map(repr, values)) or "null"
            raise ValueError(f"only {shown} is supported by {where}")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": [*values, None]})]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """`detail` is accepted and changes nothing: the model always sees all tiles."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


def _form(value: Any) -> str | None:
    return {str: "text", list: "parts"}.get(type(value))


_Texts = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")],
    Discriminator(_form),
]
_Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class System(_Strict):
    role: Literal["system", "developer"]
    content: _Texts


class User(_Strict):
    role: Literal["user"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[_Part], Field(min_length=1, max_length=1000), Tag("parts")],
        Discriminator(_form),
    ]


class Assistant(_Strict):
    """An earlier answer, also as the openai package dumps it."""

    role: Literal["assistant"]
    content: _Texts
    refusal: _only() = None
    audio: _only() = None
    function_call: _only() = None
    tool_calls: _only([]) = None
    annotations: _only([]) = None


Message = Annotated[System | User | Assistant, Field(discriminator="role")]


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: _only(False) = None


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Stop = str | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class _Request(_Strict):
    """What chats and completions have in common.

    `top_k` is vLLM's field. Without `seed` each request draws anew. `user` and its like are accepted and not used.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] | None = None
    stop: Stop | None = None
    user: str | None = None
    n: _only(1) = None
    presence_penalty: _only(0) = None
    frequency_penalty: _only(0) = None
    logit_bias: _only({}) = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: _only(False) = None
    service_tier: _only("auto", "default") = None
    modalities: _only(["text"]) = None
    response_format: _only({"type": "text"}) = None
    tools: _only([]) = None
    tool_choice: _only("none", "auto") = None
    parallel_tool_calls: _only(True, False) = None


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _prompt_form(value: Any) -> str | None:
    if isinstance(value, list):
        first = type(value[0]) if value else str
        return {int: "ids", list: "many"}.get(first, "texts")
    return "text"


_Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(min_length=1), Tag("texts")]
    | Annotated[Tokens, Tag("ids")]
    | Annotated[list[Tokens], Field(min_length=1), Tag("many")],
    Discriminator(_prompt_form),
]


class CompletionRequest(_Request):
    """`prompt`: one text, or the ids of one text, or a list of either."""

    prompt: _Prompt
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    best_of: _only(1) = None
    suffix: _only("") = None

    @property
    def prompts(self) -> list[str | list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt
