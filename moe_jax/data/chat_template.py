"""Conversations as text and tokens, by the chat template that a tokenizer's folder has.

    template = load_template("tokenizer='DIR'", tokenizer_of_transformers)
    ids = template.prompt([{"role": "user", "content": "Hello"}], enable_thinking=False)
    ids, counts = template.conversation(messages)       # to train on: counts of assistant's turns

A message has a `role` (system, user, assistant and what else the template knows) and its `content`.
Templates are rendered by transformers in Jinja's sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_jax.errors import UserError

Messages = Sequence[Mapping[str, Any]]

# What begins and ends a thought: most models, Magistral, Seed-OSS, Command A.
THOUGHTS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
CHANNEL = "<|channel|>"  # names the part of a reply that follows: reasoning, or the answer
# What transformers gives every template.
_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
# Names that templates give the switch of `--thinking`: Qwen, GLM and SmolLM; DeepSeek and Granite.
_THINKING = ("enable_thinking", "thinking")
_MARK = "\ue000"  # of private use: in no text


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer's model was taught to see a conversation."""

    given: str
    """The option with the folder, for messages."""
    source: str
    """The template itself."""
    render: Callable[[Messages, bool, Mapping[str, Any]], str]
    """Text of messages, with the beginning of a reply or without, with the template's variables.

    Raises UserError for messages that the template refuses.
    """
    encode: Callable[[str], tuple[list[int], list[tuple[int, int]] | None]]
    """Ids of a text, without a start or end token, and where in the text each begins and ends; None
    for the latter where the tokenizer cannot say.
    """
    tokens: Mapping[str, int]
    """The tokens that are no ordinary text, such as `<|im_end|>`."""

    def prompt(self, messages: Messages, **variables: Any) -> list[int]:
        """Ids of a conversation up to the start of the assistant's reply. Raises UserError where
        the template writes none.
        """
        ids = self.encode(self.render(messages, True, variables))[0]
        if not ids:
            raise UserError(
                f"{self.given}: its chat template makes no text of these messages: use moe-jax "
                f"generate without --system-prompt, or correct the template."
            )
        return ids

    def thinking(self, on: bool) -> dict[str, bool]:
        """The variable with which this template is told to think or not. Raises UserError where it
        has none.
        """
        names = [name for name in _THINKING if self.mentions(name)]
        if not names:
            raise UserError(
                f"--thinking {'on' if on else 'off'}: the chat template has no switch for it "
                f"(enable_thinking): leave the option out."
            )
        return dict.fromkeys(names, on)

    def check_variables(self, names: Iterable[str]) -> None:
        """Raises UserError for a variable that the template does not use."""
        for name in names:
            if name in _GIVEN or not self.mentions(name):
                raise UserError(
                    f"--template-kwargs {name}=...: the chat template does not use {name}: leave "
                    f"it out, or take a name from {self.given}."
                )

    def mentions(self, name: str) -> bool:
        """Whether a variable of this name occurs in the template."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends an assistant's turn; None where ordinary text does."""
        name = self._token_after(self._ending)
        return None if name is None else self.tokens[name.lstrip()]

    @cached_property
    def _ending(self) -> str:
        """The tokens behind what the assistant says in the last turn, with the blanks in front of
        them: as a rule one token, or none.
        """
        turn = {"role": "assistant", "content": f"{_MARK}0{_MARK}"}
        try:
            text = self.render([{"role": "user", "content": "?"}, turn], False, {})
        except UserError:  # a template that writes prompts alone: nothing is known of turns
            return ""
        _, said, rest = text.rpartition(turn["content"])
        ending = (self._token_after(rest) or "") if said else ""
        while ending and (more := self._token_after(rest[len(ending) :])) and not more[0].isspace():
            ending += more
        # Of several channels, each ends with <|end|>, and the turn goes on behind it.
        return "" if ending == "<|end|>" and CHANNEL in self.tokens else ending

    def whole(self, messages: Messages) -> list[int]:
        """Ids of a whole conversation."""
        return self.encode(self.render(messages, False, {}))[0]

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a whole conversation, and which of them the assistant says: its text and the token
        that ends its turn.

        Raises UserError for messages that the template refuses, and where the assistant's text is
        not found in what it renders.
        """
        text = self.render(messages, False, {})
        spans = self._replies(messages, text)
        ids, places = self.encode(text)
        if places is None:
            raise UserError(
                f"{self.given}: this tokenizer does not say where a token begins, so the "
                f"assistant's turns are not found: set data.loss_on=all."
            )
        # A token may hold the blank in front of a reply too.
        return ids, [
            any(start < end and begin < stop for begin, end in spans) for start, stop in places
        ]

    def _replies(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        """Where in the rendered text each turn of the assistant begins and ends.

        The conversation is rendered once more with a mark for what the assistant says. What is
        around the marks is around its text as well, whatever the template does to the text. Turns
        without a text (calls of tools) have no mark.
        """
        turns = [message for message in messages if message["role"] == "assistant"]
        says = [message for message in turns if message.get("content")]
        marked = [
            dict(message, content=f"{_MARK}{number}{_MARK}")
            if message["role"] == "assistant" and message.get("content")
            else message
            for number, message in enumerate(messages)
        ]
        *before, last = re.split(rf"{_MARK}\d+{_MARK}", self.render(marked, False, {}))
        spans, begin = [], 0
        for number, part in enumerate([*map(self._up_to_reply, before), last]):
            at = text.find(part, begin) if number < len(before) else len(text) - len(part)
            if at < begin or (number == 0 and at > 0) or not text.startswith(part, at):
                raise self._not_found()
            if number > 0:
                spans.append((begin, at + len(self._end_of_turn(part))))
            begin = at + len(part)
            if len(says) < len(turns):
                spans += self._silent_turns(text, at, begin)
        if len(before) != len(says) or len(spans) != len(turns):
            raise self._not_found()
        return spans

    def _silent_turns(self, text: str, begin: int, end: int) -> list[tuple[int, int]]:
        """Turns of the assistant in a part of the text, from where generation begins to the ending
        of a turn.
        """
        spans: list[tuple[int, int]] = []
        opening, ending = self._opening, self._ending
        while opening and ending and (at := text.find(opening, begin, end)) >= 0:
            stop = text.find(ending, at, end)
            if stop < 0:
                break
            begin = stop + len(ending)
            spans.append((at + len(opening), begin))
        return spans

    def _not_found(self) -> UserError:
        return UserError(
            f"{self.given}: its chat template changes what the assistant says, so its turns are "
            f"not found: set data.loss_on=all."
        )

    def _up_to_reply(self, part: str) -> str:
        """What is in front of a reply without what the model says itself before its text, such as
        an empty thought: from the place on where generation begins.
        """
        if not self._opening:  # generation begins where the question ends, with a blank
            return part.rstrip()
        at = part.rfind(self._opening)
        return part if at < 0 else part[: at + len(self._opening)]

    @cached_property
    def _opening(self) -> str:
        """The text with which a reply begins in a prompt."""
        question = [{"role": "user", "content": "?"}]
        whole, plain = (self.render(question, opened, {}) for opened in (True, False))
        opening = whole.removeprefix(plain) if whole.startswith(plain) else ""
        for thought in THOUGHTS:  # which a later turn does not begin with the same words
            opening = opening.partition(thought)[0]
        return opening

    def _end_of_turn(self, rest: str) -> str:
        """The part of the text behind a reply that the model is to say: up to the token that ends
        the turn.
        """
        if self._ending and self._ending in rest:
            return rest[: rest.index(self._ending) + len(self._ending)]
        return self._token_after(rest) or ""

    def _token_after(self, rest: str) -> str | None:
        """The token at the beginning of a text, with the blanks in front of it."""
        text = rest.lstrip()
        name = max((name for name in self.tokens if text.startswith(name)), key=len, default=None)
        return None if name is None else rest[: len(rest) - len(text) + len(name)]


def load_template(given: str, inner: Any) -> ChatTemplate:
    """The template of a tokenizer of transformers; `given` starts every message."""

    def render(messages: Messages, opened: bool, variables: Mapping[str, Any]) -> str:
        try:
            import jinja2
        except ModuleNotFoundError as error:
            raise UserError(
                f"{given}: its chat template needs the `jinja2` package: pip install "
                f"'jinja2>=3.1.6'."
            ) from error
        try:
            return inner.apply_chat_template(
                _clean(messages), add_generation_prompt=opened, tokenize=False, **variables
            )
        except Exception as error:  # a template is a program: it may raise anything
            cause = " ".join(str(error).split())[:200]
            if isinstance(error, jinja2.TemplateSyntaxError):
                raise UserError(
                    f"{given}: its chat template is not Jinja ({cause}): correct it, or download "
                    f"it again."
                ) from error
            raise UserError(
                f"{given}: its chat template refuses these messages ({cause}): use other roles, or "
                f"correct the template."
            ) from error

    def encode(text: str) -> tuple[list[int], list[tuple[int, int]] | None]:
        found = inner(
            text,
            add_special_tokens=False,
            truncation=False,
            verbose=False,
            return_offsets_mapping=inner.is_fast,
        )
        places = found["offset_mapping"] if inner.is_fast else None
        return [int(token) for token in found["input_ids"]], places

    source = inner.chat_template
    return ChatTemplate(
        given=given,
        source=source if isinstance(source, str) else "\n".join(source.values()),
        render=render,
        encode=encode,
        tokens={token.content: number for number, token in inner.added_tokens_decoder.items()},
    )


def without_surrogates(text: str) -> str:
    """The text with "?" for lone surrogates: `tokenizers` refuses what UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _clean(value: Any) -> Any:
    """Messages whose texts hold no lone surrogates."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    return [_clean(item) for item in value] if isinstance(value, (list, tuple)) else value
