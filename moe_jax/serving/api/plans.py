"""A checked body as a plan: what the engine is asked for, one request per answer, and how the
answers are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moe_jax.generation.reasoning import Channels, Thoughts, reply_splitter
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.serving.api.answering import Choice
from moe_jax.serving.api.errors import ApiError
from moe_jax.serving.api.grammar import (
    AnswerFilter,
    calls_grammar,
    check_grammar,
    json_grammar,
)
from moe_jax.serving.api.prompts import ServedModel, logit_bias, seeds, stop_texts
from moe_jax.serving.api.replies import Calls, chat_reply, completion_reply
from moe_jax.serving.api.shapes import ChatShape, CompletionShape, Envelope
from moe_jax.serving.api.tool_calls import ChannelCalls, TaggedCalls, is_tagged
from moe_jax.serving.request import Request


class Plan(NamedTuple):
    """What is to be done for a request."""

    choices: list[Choice]
    shape: ChatShape | CompletionShape
    envelope: Envelope
    prompt_tokens: int
    stream: bool
    include_usage: bool
    user: str | None


def chat_plan(model: ServedModel, body: Any) -> Plan:
    """The plan of a chat. Raises ApiError for what cannot be done."""
    _check_common(model, body)
    if body.top_logprobs is not None and not body.logprobs:
        raise _conflict("top_logprobs", "it needs logprobs: true")
    asked, names = _asked_tokens(body)
    tools, demanded = _offered_tools(model, body)
    prompt = model.chat_prompt(body, tools=tools)
    max_tokens = model.answer_tokens(prompt, asked, names)
    splitter = reply_splitter(model.tokenizer, prompt)
    grammar = _grammar(model, body, tools if demanded else [], splitter)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    choices = []
    for number, seed in enumerate(seeds(body, body.n)):
        splitter = reply_splitter(model.tokenizer, prompt)
        token_filter = (
            None if grammar is None else AnswerFilter(model.vocabulary, grammar, splitter)
        )
        request = _request(model, body, prompt, max_tokens, seed, logprobs, token_filter)
        calls = _calls(model, splitter) if tools else None
        one_call = not body.parallel_tool_calls
        reply = chat_reply(model, splitter, stop_texts(body), calls, one_call=one_call)
        choices.append(Choice(number, request, reply))
    envelope = Envelope(model.name, "chat.completion", "chat.completion.chunk", "chatcmpl")
    return _plan(body, choices, ChatShape(model.vocabulary, logprobs), envelope, len(prompt))


def completion_plan(model: ServedModel, body: Any) -> Plan:
    """The plan of a completion, of one prompt or several. Raises ApiError for what cannot be
    done.
    """
    _check_common(model, body)
    if body.echo and body.logprobs is not None:
        raise _conflict("echo", "log-probabilities of the prompt are not computed")
    prompts = _prompts(model, body.prompt)
    names = {"prompt": "prompt", "tokens": "max_tokens"}
    choices: list[Choice] = []
    echo: list[str] = []
    numbers = iter(seeds(body, len(prompts) * body.n))
    for prompt in prompts:
        max_tokens = model.answer_tokens(prompt, body.max_tokens, names)
        for _ in range(body.n):
            request = _request(model, body, prompt, max_tokens, next(numbers), body.logprobs, None)
            reply = completion_reply(model, prompt, stop_texts(body))
            choices.append(Choice(len(choices), request, reply))
            echo.append(model.tokenizer.decode(prompt) if body.echo else "")
    envelope = Envelope(model.name, "text_completion", "text_completion", "cmpl")
    shape = CompletionShape(model.vocabulary, body.logprobs, echo)
    return _plan(body, choices, shape, envelope, sum(map(len, prompts)))


def _plan(body: Any, choices: list[Choice], shape: Any, envelope: Envelope, prompt: int) -> Plan:
    options = body.stream_options
    usage = options is not None and bool(options.include_usage)
    return Plan(choices, shape, envelope, prompt, bool(body.stream), usage, body.user)


def _conflict(param: str, why: str) -> ApiError:
    return ApiError(400, f"{param} cannot be had like this: {why}.", param=param)


def _check_common(model: ServedModel, body: Any) -> None:
    model.check_name(body.model)
    if body.stream_options is not None and not body.stream:
        raise _conflict("stream_options", "it needs stream: true")
    model.check_ids(body.stop_token_ids or [], "stop_token_ids")


def _asked_tokens(body: Any) -> tuple[int | None, dict[str, str]]:
    """The limit of a chat's answer under either of its names, and the names of the fields."""
    newer, older = body.max_completion_tokens, body.max_tokens
    if newer is not None and older is not None and newer != older:
        raise _conflict("max_tokens", "max_completion_tokens says another number")
    name = "max_tokens" if newer is None and older is not None else "max_completion_tokens"
    return newer or older, {"prompt": "messages", "tokens": name}


def _prompts(model: ServedModel, given: Any) -> list[list[int]]:
    """The prompts of a completion in tokens."""
    if isinstance(given, str):
        return [model.text_prompt(given)]
    if isinstance(given[0], str):
        return [model.text_prompt(text) for text in given]
    prompts = [given] if isinstance(given[0], int) else given
    for prompt in prompts:
        model.check_ids(prompt, "prompt")
    return [list(prompt) for prompt in prompts]


def _request(
    model: ServedModel,
    body: Any,
    prompt: Sequence[int],
    max_tokens: int,
    seed: int,
    logprobs: int | None,
    token_filter: AnswerFilter | None,
) -> Request:
    if body.min_tokens > max_tokens:
        raise _conflict("min_tokens", f"the answer has {max_tokens:,} tokens at most")
    return Request(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        sampling=SamplingOptions(
            temperature=body.temperature,
            top_k=body.top_k if body.top_k > 0 else None,
            top_p=body.top_p if body.top_p < 1 else None,
            min_p=body.min_p if body.min_p > 0 else None,
            repetition_penalty=body.repetition_penalty,
            seed=seed,
        ),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=logit_bias(model, body),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        token_filter=token_filter,
    )


# Tools and formats


def _offered_tools(model: ServedModel, body: Any) -> tuple[list[Any], bool]:
    """The tools that the template is told of, and whether one of them must be called."""
    choice, tools = body.tool_choice, list(body.tools or [])
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    demanded = named is not None or choice == "required"
    if demanded and not tools:
        raise _conflict("tool_choice", "it needs tools")
    if not tools or choice == "none":
        return [], False
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise _conflict("tools", "two functions have one name")
    if named is not None:
        tools = [tool for tool in tools if tool.function.name == named]
        if not tools:
            raise _conflict("tool_choice", "it names a function that tools does not have")
    if not model.chat.mentions("tools"):
        raise ApiError(
            400,
            "tools is not supported with this model: its chat template does not take tools.",
            param="tools",
            code="unsupported_parameter",
        )
    if body.response_format is not None and body.response_format.type != "text":
        raise _conflict("response_format", "with tools the answer is text or a call")
    return tools, demanded


def _calls(model: ServedModel, splitter: Thoughts | Channels) -> Calls:
    if isinstance(splitter, Channels):
        return ChannelCalls()
    if is_tagged(model.chat):
        return TaggedCalls()
    raise ApiError(
        400,
        "tools is not supported with this model: its chat template writes calls in a form that is "
        "not known here.",
        param="tools",
        code="unsupported_parameter",
    )


def _grammar(
    model: ServedModel, body: Any, demanded: Sequence[Any], splitter: Thoughts | Channels
) -> str | None:
    """The grammar that the answer follows, if it follows one."""
    wanted = body.response_format
    if demanded:
        if isinstance(splitter, Channels):
            raise ApiError(
                400,
                "tool_choice can be none or auto with this model: a call cannot be demanded of it.",
                param="tool_choice",
                code="unsupported_parameter",
            )
        functions = [tool.function for tool in demanded]
        param = "tools"
        grammar = calls_grammar(model.vocabulary, functions, body.parallel_tool_calls)
    elif wanted is None or wanted.type == "text":
        return None
    else:
        param = "response_format"
        schema = {"type": "object"}
        if wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema_ is None:
                raise ApiError(
                    400,
                    "response_format.json_schema.schema is missing.",
                    param="response_format.json_schema",
                    code="missing_required_parameter",
                )
            schema = wanted.json_schema.schema_
        grammar = json_grammar(schema)
    for name in ("ignore_eos", "min_tokens"):
        if getattr(body, name):
            raise _conflict(name, "the answer ends where its JSON ends")
    check_grammar(model.vocabulary, grammar, param)
    return grammar
