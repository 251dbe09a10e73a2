"""The table of all fields that a request may have. From it come the checks, the refusals by name,
the table of the documentation and the schemas of /openapi.json.

    body = CHAT.model.model_validate({"model": "m", "messages": [...], "temperature": 0.5})

A field that is refused is in the table as well, with the values that change nothing and may
therefore be sent. A field that is not in the table is refused as unknown. `null` means that a field
is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import GenericAlias
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, create_model

# Floats are what JSON calls numbers; strict: "0.5" and true are none.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES, MOST_TOOLS = 32, 16, 20, 300, 128


@dataclass(frozen=True)
class ApiField:
    """A field of a request: what it may be, and what it does or why it is refused."""

    name: str
    type: Any
    """For pydantic, with its range. Of a refused field: the values that change nothing."""
    about: str
    default: Any = None
    required: bool = False
    refused: bool = False


@dataclass(frozen=True)
class ApiTable:
    """The fields of one route's body, or of an object inside one."""

    name: str
    fields: tuple[ApiField, ...]

    @property
    def model(self) -> type[BaseModel]:
        """The pydantic model that checks such a body; the same object each time."""
        return _MODELS[self.name]

    def named(self, name: object) -> ApiField | None:
        """The field of this name."""
        return next((field for field in self.fields if field.name == name), None)


def _model(table: ApiTable) -> type[BaseModel]:
    entries: dict[str, Any] = {}
    for field in table.fields:
        about = f"Refused: {field.about}" if field.refused else field.about
        # BaseModel has a method of the name `schema`.
        name, alias = ("schema_", "schema") if field.name == "schema" else (field.name, None)
        kind = field.type if field.required else field.type | None
        rest = {} if field.required else {"default": field.default}
        entries[name] = (kind, Field(description=about, alias=alias, **rest))
    return create_model(table.name, __config__=_STRICT, **entries)


_MODELS: dict[str, type[BaseModel]] = {}


def _table(name: str, *fields: ApiField) -> ApiTable:
    table = ApiTable(name, fields)
    _MODELS[name] = _model(table)
    return table


def _required(name: str, type: Any, about: str) -> ApiField:
    return ApiField(name, type, about, required=True)


def _refused(name: str, why: str, *neutral: Any) -> ApiField:
    """A field that is not supported, and the values of it that are what happens anyway."""
    return ApiField(name, Literal[(None, *neutral)], why, refused=True)


class _FirstMistake:
    """Of a million wrong items of a list the first is enough. pydantic's own mark for this cannot
    be part of a union: it has no hash.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), "fail_fast": True}


_FIRST_MISTAKE = _FirstMistake()


def _list_of(item: Any, *limits: Any) -> Any:
    """A list type whose items' type is a value, with limits to its length."""
    kind: Any = Annotated[GenericAlias(list, (item,)), _FIRST_MISTAKE]
    for limit in limits:
        kind = Annotated[kind, limit]
    return kind


Text = Annotated[str, MaxLen(10**7)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
TokenId = Annotated[int, Ge(0), Le(2**31 - 1)]
TokenIds = _list_of(TokenId, MinLen(1))
_Penalty = Annotated[float, Ge(-2), Le(2)]

# Objects inside a body

STREAM_OPTIONS = _table(
    "StreamOptions",
    ApiField("include_usage", bool, "A last chunk with `usage` and no choices.", False),
    _refused("include_obfuscation", "chunks are not padded.", False),
)
TEXT_PART = _table(
    "TextPart",
    _required("type", Literal["text"], "Only text is read: no images, audio or files."),
    _required("text", Text, "The text."),
)
CALLED_FUNCTION = _table(
    "CalledFunction",
    _required("name", Annotated[str, MinLen(1), MaxLen(256)], "Of the function."),
    _required("arguments", Text, "A JSON object, as text."),
)
TOOL_CALL = _table(
    "ToolCall",
    _required("id", Annotated[str, MaxLen(256)], "By which a tool's answer names it."),
    _required("type", Literal["function"], "Only functions are called."),
    _required("function", CALLED_FUNCTION.model, "What was called."),
    ApiField("index", int, "As chunks of a stream have it; not used."),
)
MESSAGE = _table(
    "Message",
    _required(
        "role",
        Literal["system", "developer", "user", "assistant", "tool"],
        "Who speaks; `developer` is read as `system` where the chat template knows only that.",
    ),
    ApiField(
        "content", Text | _list_of(TEXT_PART.model), "What is said: text, or parts that are text."
    ),
    ApiField("name", Annotated[str, MaxLen(256)], "Of a tool or a speaker, for the chat template."),
    ApiField("tool_calls", _list_of(TOOL_CALL.model), "What an assistant's turn called."),
    ApiField("tool_call_id", Annotated[str, MaxLen(256)], "Which call a tool's turn answers."),
    ApiField("reasoning_content", Text, "What an earlier turn thought, for the chat template."),
    _refused("refusal", "this server writes no refusals."),
    _refused("audio", "there is no audio."),
    _refused("function_call", "it is the old form: use tool_calls."),
    ApiField("annotations", Annotated[list[Any], MaxLen(0)], "Empty, as answers have it."),
)
FUNCTION = _table(
    "Function",
    _required("name", Name, "By which the model calls it."),
    ApiField("description", Text, "What it does, for the model."),
    ApiField("parameters", dict[str, Any], "JSON schema of its arguments."),
    ApiField(
        "strict",
        bool,
        "Arguments keep to the schema; only with a `tool_choice` that demands a call.",
    ),
)
TOOL = _table(
    "Tool",
    _required("type", Literal["function"], "Only functions can be offered."),
    _required("function", FUNCTION.model, "What the model may call."),
)
CHOSEN_FUNCTION = _table("ChosenFunction", _required("name", Name, "Of the function."))
CHOSEN_TOOL = _table(
    "ChosenTool",
    _required("type", Literal["function"], "Only functions can be chosen."),
    _required("function", CHOSEN_FUNCTION.model, "Which one must be called."),
)
JSON_SCHEMA = _table(
    "JsonSchemaFormat",
    _required("name", Name, "For the client; the model does not see it."),
    ApiField("description", Text, "For the client; the model does not see it."),
    ApiField("schema", dict[str, Any], "What the answer must match."),
    ApiField("strict", bool, "The answer always matches, whatever this says."),
)
RESPONSE_FORMAT = _table(
    "ResponseFormat",
    _required("type", Literal["text", "json_object", "json_schema"], "What the answer must be."),
    ApiField("json_schema", JSON_SCHEMA.model, "With the type `json_schema`."),
)

# Bodies

_MODEL = _required("model", Annotated[str, MaxLen(1024)], "The name that /v1/models gives.")
_COMMON = (
    _MODEL,
    ApiField("n", Annotated[int, Ge(1), Le(MOST_CHOICES)], "Answers per prompt.", 1),
    ApiField("stream", bool, "Answer in server-sent events, as the text comes.", False),
    ApiField("stream_options", STREAM_OPTIONS.model, "Only with `stream`."),
    ApiField(
        "stop",
        Annotated[str, MinLen(1), MaxLen(1000)]
        | Annotated[list[Annotated[str, MinLen(1), MaxLen(1000)]], MaxLen(MOST_STOPS)],
        "The answer ends before this text, or the first of these.",
    ),
    ApiField("stop_token_ids", Annotated[list[TokenId], MaxLen(64)], "Tokens that end the answer."),
    ApiField(
        "seed",
        Annotated[int, Ge(-(2**63)), Le(2**63 - 1)],
        "The same seed and request give the same answer, whatever else runs; answers of one "
        "request differ. By default drawn.",
    ),
    ApiField("temperature", Annotated[float, Ge(0), Le(2)], "0 takes the likeliest token.", 1.0),
    ApiField("top_p", Annotated[float, Ge(0), Le(1)], "Among the likeliest of this sum.", 1.0),
    ApiField("top_k", Annotated[int, Ge(-1), Le(2**31 - 1)], "Among so many; 0 or -1: all.", 0),
    ApiField(
        "min_p", Annotated[float, Ge(0), Le(1)], "Drops tokens below this times the likeliest.", 0.0
    ),
    ApiField(
        "repetition_penalty",
        Annotated[float, Ge(0.01), Le(100)],
        "Divides the positive logits of tokens that occurred, the prompt's included.",
        1.0,
    ),
    ApiField("presence_penalty", _Penalty, "Lowers tokens that the answer has.", 0.0),
    ApiField("frequency_penalty", _Penalty, "The same, for each time.", 0.0),
    ApiField(
        "logit_bias",
        Annotated[dict[str, Annotated[float, Ge(-100), Le(100)]], MaxLen(MOST_BIASES)],
        "Token ids, as text, with what is added to their logits.",
    ),
    ApiField("min_tokens", Annotated[int, Ge(0), Le(2**31 - 1)], "No end token before.", 0),
    ApiField("ignore_eos", bool, "Goes on after the model's end token.", False),
    ApiField("user", Annotated[str, MaxLen(256)], "Is named in the server's log."),
)
_TOKENS = Annotated[int, Ge(1), Le(2**31 - 1)]

COMPLETION = _table(
    "CompletionRequest",
    *_COMMON,
    _required(
        "prompt",
        Text | TokenIds | _list_of(Text, MinLen(1)) | _list_of(TokenIds, MinLen(1)),
        "A text, its tokens, or a list of either.",
    ),
    ApiField("max_tokens", _TOKENS, "Tokens to generate at most.", 16),
    ApiField(
        "logprobs",
        Annotated[int, Ge(0), Le(MOST_LOGPROBS)],
        "Log-probabilities of each token and of so many likeliest ones.",
    ),
    ApiField("echo", bool, "The answer begins with the prompt; not with `logprobs`.", False),
    _refused("best_of", "answers are not ranked: use n.", 1),
    _refused("suffix", "text is continued, not filled in."),
)
CHAT = _table(
    "ChatCompletionRequest",
    *_COMMON,
    _required("messages", _list_of(MESSAGE.model, MinLen(1)), "The conversation, oldest first."),
    ApiField(
        "max_completion_tokens",
        _TOKENS,
        "Tokens to generate at most, reasoning included. By default what the context has room for.",
    ),
    ApiField("max_tokens", _TOKENS, "The older name of the same."),
    ApiField(
        "logprobs",
        bool,
        "Log-probabilities of each token, those of reasoning and tool calls included.",
        False,
    ),
    ApiField(
        "top_logprobs",
        Annotated[int, Ge(0), Le(MOST_LOGPROBS)],
        "So many likeliest tokens in each place; with `logprobs`.",
    ),
    ApiField(
        "response_format",
        RESPONSE_FORMAT.model,
        "Text, any JSON object, or JSON that matches a schema; reasoning stays free.",
    ),
    ApiField(
        "tools",
        _list_of(TOOL.model, MaxLen(MOST_TOOLS)),
        "Functions that the model may call, where its chat template takes tools.",
    ),
    ApiField(
        "tool_choice",
        Literal["none", "auto", "required"] | CHOSEN_TOOL.model,
        "Whether a tool may or must be called, and which; `required` and a chosen one where calls "
        "are written in `<tool_call>`. By default auto.",
    ),
    ApiField("parallel_tool_calls", bool, "False: the answer ends after one call.", True),
    ApiField(
        "reasoning_effort",
        Literal["none", "minimal", "low", "medium", "high", "xhigh"],
        "For templates that take it; `none` also where thinking can be switched off.",
    ),
    ApiField(
        "chat_template_kwargs",
        dict[str, Any],
        "Variables of the chat template, such as `enable_thinking`.",
    ),
    ApiField("modalities", _list_of(Literal["text"], MaxLen(1)), "Text alone can be answered."),
    _refused("audio", "there is no audio."),
    _refused("functions", "it is the old form: use tools."),
    _refused("function_call", "it is the old form: use tool_choice."),
    _refused("prediction", "there is no speculative decoding of a given text."),
    _refused("store", "nothing is stored.", False),
    _refused("metadata", "nothing is stored."),
    _refused("service_tier", "all requests are served alike.", "auto", "default"),
    _refused("web_search_options", "nothing is searched."),
    _refused("verbosity", "the model is not told of it."),
    _refused("safety_identifier", "requests are not judged: use user to have one in the log."),
    _refused("prompt_cache_key", "prompts that begin alike are found without it."),
    _refused("prompt_cache_retention", "how long a prompt is kept depends on the load."),
    _refused("prompt_cache_options", "prompts that begin alike are found without them."),
    _refused("moderation", "requests are not judged."),
)
TOKENIZE = _table(
    "TokenizeRequest",
    ApiField("model", Annotated[str, MaxLen(1024)], "The name that /v1/models gives."),
    ApiField("prompt", Text, "A text; either this or `messages`."),
    ApiField("messages", _list_of(MESSAGE.model, MinLen(1)), "A conversation."),
    ApiField("tools", _list_of(TOOL.model, MaxLen(MOST_TOOLS)), "With `messages`."),
    ApiField("chat_template_kwargs", dict[str, Any], "With `messages`."),
    ApiField("add_special_tokens", bool, "Of a prompt: the start token, where there is one.", True),
    ApiField("return_token_strs", bool, "The text of each token too.", False),
)
DETOKENIZE = _table(
    "DetokenizeRequest",
    ApiField("model", Annotated[str, MaxLen(1024)], "The name that /v1/models gives."),
    _required("tokens", _list_of(TokenId), "Ids of tokens."),
)

BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": COMPLETION,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
}
_INNER = (
    *(STREAM_OPTIONS, TEXT_PART, CALLED_FUNCTION, TOOL_CALL, MESSAGE, FUNCTION, TOOL),
    *(CHOSEN_FUNCTION, CHOSEN_TOOL, JSON_SCHEMA, RESPONSE_FORMAT),
)
FIELD_NAMES = frozenset(
    field.name for table in (*BODIES.values(), *_INNER) for field in table.fields
)


def schemas() -> dict[str, Any]:
    """JSON schemas of all bodies and of the objects in them, by name, as /openapi.json has them."""
    found: dict[str, Any] = {}
    for table in BODIES.values():
        schema = table.model.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= schema.pop("$defs", {})
        found[table.name] = schema
    return found


def range_text(schema: Any) -> str:
    """What a JSON schema lets through, in words: `number, 0 to 2`."""
    if "anyOf" in schema:
        options = [range_text(option) for option in schema["anyOf"] if option != {"type": "null"}]
        return " or ".join(dict.fromkeys(options))
    if "$ref" in schema:
        return f"object {schema['$ref'].rpartition('/')[2]}"
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join("null" if value is None else f"`{_json(value)}`" for value in values)
    kind = schema.get("type", "any value")
    if kind == "array":
        inner = range_text(schema.get("items", {}))
        most = schema.get("maxItems")
        return f"list of {inner}" + ("" if most is None else f", at most {most}")
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None or abs(low) > 10**9:
        return kind
    return (
        f"{kind}, {low:g} or more"
        if high is None or high > 10**6
        else f"{kind}, {low:g} to {high:g}"
    )


def _json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def markdown_rows() -> Iterator[str]:
    """The table of the documentation: each field of the two routes that generate text."""
    routes = {"chat": CHAT, "completions": COMPLETION}
    yield "| field | chat | completions | type and range | default | what it does |"
    yield "|---|---|---|---|---|---|"
    properties = {
        route: table.model.model_json_schema()["properties"] for route, table in routes.items()
    }
    seen: set[tuple[str, str]] = set()
    for route, table in routes.items():
        for field in table.fields:
            text = range_text(properties[route][field.name])
            if (field.name, text) in seen:
                continue
            seen.add((field.name, text))
            where = []
            for other, theirs in routes.items():
                known = theirs.named(field.name)
                same = known is not None and range_text(properties[other][field.name]) == text
                refused = same and known is not None and known.refused
                where.append("refused" if refused else "yes" if same else "")
            default = "" if field.default is None else f"`{_json(field.default)}`"
            default = "required" if field.required else default
            text = f"only {text}" if field.refused else text
            yield f"| `{field.name}` | {' | '.join(where)} | {text} | {default} | {field.about} |"
