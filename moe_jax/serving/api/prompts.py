"""From a body to what the engine is asked for: prompts in tokens, limits, sampling.

Everything that is wrong with a request is found here, before it waits for its turn.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moe_jax.errors import UserError
from moe_jax.generation.template_options import TemplateOptions
from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.grammar import Vocabulary

if TYPE_CHECKING:
    from moe_jax.data.chat_template import ChatTemplate
    from moe_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ServedModel:
    """What the API knows of the model."""

    name: str
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    context: int
    """Tokens of a text, prompt and answer together."""
    start_token: bool = True
    """Whether a prompt begins with the tokenizer's start token; training gives a run's model none.
    """
    created: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokens as bytes."""
        return Vocabulary(self.tokenizer, self.eos_ids)

    def check_name(self, name: str | None) -> None:
        """Raises ApiError, status 404, for a model that is not served."""
        if name is not None and name != self.name:
            raise ApiError(
                404,
                f"The model {name[:100]!a} is not served here: {self.name!a} is.",
                param="model",
                code="model_not_found",
            )

    def text_prompt(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text to go on from."""
        if special and self.start_token:
            return self.tokenizer.encode_prompt(text)
        return self.tokenizer.encode(text)

    def chat_prompt(self, body: Any, *, tools: Sequence[Any] = ()) -> list[int]:
        """Tokens of a conversation up to the reply. Raises ApiError where the model has no chat
        template, or where it refuses the messages or does not use a variable.
        """
        chat = self.chat
        variables = _variables(chat, body)
        if tools:
            variables["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
        messages = [
            _message(chat, message, f"messages[{number}]")
            for number, message in enumerate(body.messages)
        ]
        try:
            return chat.prompt(messages, **variables)
        except UserError as error:
            raise ApiError(
                400, str(error).removeprefix(f"{chat.given}: "), param="messages"
            ) from None

    @property
    def chat(self) -> ChatTemplate:
        """The chat template. Raises ApiError where there is none."""
        if self.tokenizer.chat is None:
            raise ApiError(
                400, "This model has no chat template: use /v1/completions.", param="messages"
            )
        return self.tokenizer.chat

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises ApiError for a token that the model does not have."""
        if ids and max(ids) >= self.tokenizer.num_ids:
            raise ApiError(
                400,
                f"{param} has the token {max(ids)}, and the model's tokens are 0 to "
                f"{self.tokenizer.num_ids - 1}.",
                param=param,
                code="invalid_value",
            )

    def answer_tokens(
        self, prompt: Sequence[int], asked: int | None, names: Mapping[str, str]
    ) -> int:
        """How many tokens an answer may have: those asked for, or what the context has room for.

        Raises ApiError where there is no room; `names` are the fields of `prompt` and `tokens`.
        """
        if not prompt:
            raise ApiError(400, f"{names['prompt']} is empty.", param=names["prompt"])
        room = self.context - len(prompt)
        if room < (asked or 1):
            wanted = "" if asked is None else f" and {names['tokens']} asks for {asked:,} more"
            raise ApiError(
                400,
                f"The prompt has {len(prompt):,} tokens{wanted}, and the context is "
                f"{self.context:,} tokens: shorten one of them.",
                param=names["prompt"] if asked is None or room < 1 else names["tokens"],
                code="context_length_exceeded",
            )
        return asked or room


def _variables(chat: ChatTemplate, body: Any) -> dict[str, Any]:
    """Variables of the template that a request asks for. Raises ApiError for one that the template
    does not use.
    """
    given = dict(body.chat_template_kwargs or {})
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None and chat.mentions("reasoning_effort"):
        given["reasoning_effort"] = effort
    elif effort is not None:
        given |= _without_thinking(chat, effort)
    try:
        return TemplateOptions(variables=given).of(chat)
    except UserError:
        names = ", ".join(sorted(str(name)[:40] for name in given))
        raise ApiError(
            400,
            f"chat_template_kwargs has a name that the model's chat template does not use, among: "
            f"{names!a}.",
            param="chat_template_kwargs",
            code="invalid_value",
        ) from None


def _without_thinking(chat: ChatTemplate, effort: str) -> dict[str, bool]:
    """The switch of a template that knows no degrees of reasoning. Raises ApiError for a degree,
    and where there is no switch.
    """
    try:
        if effort == "none":
            return chat.thinking(False)
        why = "the model's chat template knows no degrees"
    except UserError:
        why = "the model's chat template does not use it"
    raise ApiError(
        400,
        f"reasoning_effort {effort} is not supported: {why}.",
        param="reasoning_effort",
        code="unsupported_parameter",
    )


def _message(chat: ChatTemplate, message: Any, place: str) -> dict[str, Any]:
    """A message as templates expect it. Raises ApiError for one that says nothing."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    if content is None:
        if not (message.role == "assistant" and message.tool_calls):
            raise ApiError(
                400,
                f"{place}.content is missing.",
                param=f"{place}.content",
                code="missing_required_parameter",
            )
        content = ""
    knows = message.role != "developer" or "developer" in chat.source
    said: dict[str, Any] = {"role": message.role if knows else "system", "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            said[name] = getattr(message, name)
    if message.tool_calls:
        said["tool_calls"] = [
            _past_call(call, f"{place}.tool_calls[{number}]")
            for number, call in enumerate(message.tool_calls)
        ]
    return said


def _past_call(call: Any, place: str) -> dict[str, Any]:
    """A call of an earlier turn: templates write its arguments as JSON themselves."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        param = f"{place}.function.arguments"
        raise ApiError(
            400, f"{param} is not a JSON object, as text.", param=param, code="invalid_value"
        )
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def stop_texts(body: Any) -> list[str]:
    """The strings that end an answer."""
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or [])


def seeds(body: Any, count: int) -> list[int]:
    """A seed for each answer: that of the request, and those after it."""
    first = secrets.randbits(63) if body.seed is None else body.seed
    return [(first + number) % 2**64 for number in range(count)]


def logit_bias(model: ServedModel, body: Any) -> dict[int, float]:
    """What is added to the logits of which token. Raises ApiError for what is no token."""
    biases: dict[int, float] = {}
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise ApiError(
                400,
                f"logit_bias has the key {name[:20]!a}, which is no token's number.",
                param="logit_bias",
                code="invalid_value",
            )
        biases[int(name)] = value
    model.check_ids(list(biases), "logit_bias")
    return biases
