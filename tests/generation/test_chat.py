"""Conversations: what is read anew, what is remembered, commands, interrupts, a full context, and
other people's templates.
"""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from moe_jax.cli.chat import run_chat
from moe_jax.cli.reasoning import ReasoningWriter
from moe_jax.data.tokenizer import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.generation.chat import Conversation
from moe_jax.generation.sampling_options import SamplingOptions
from moe_jax.generation.template_options import TemplateOptions
from tests.support.fake_model import END, Loaded, install, shout
from tests.support.imports import replace_import
from tests.support.tokenizers import save_folder

GREEDY = SamplingOptions(temperature=0.0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    model = Loaded(shout)
    install(monkeypatch, model)
    return model


def read(loaded: Loaded) -> list[int]:
    """Lengths of what was read at a time."""
    return [len(tokens) for tokens in loaded.feeds]


def test_turns_are_remembered_and_only_the_rest_is_read(loaded: Loaded) -> None:
    conversation = Conversation(loaded, GREEDY, system="loud")
    assert "".join(conversation.reply("one")) == "ONE"
    assert loaded.feeds[0] == list(b"S:loud\nU:one\nA:") and read(loaded)[1:] == [1, 1, 1]
    loaded.feeds.clear()
    assert "".join(conversation.reply("more")) == "MORE"
    # The cache holds the first turn and its reply, which the template renders as they were.
    assert loaded.feeds[0] == list(b"\nU:more\nA:")
    assert conversation.figures.reused_tokens == len(b"S:loud\nU:one\nA:ONE")
    assert conversation.figures.prompt_tokens == len(b"S:loud\nU:one\nA:ONE\nU:more\nA:")
    assert [message["role"] for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    loaded.feeds.clear()
    conversation.reset()
    assert "".join(conversation.reply("one")) == "ONE"
    assert loaded.feeds[0] == [ord(":")]  # all is cached; one token gives the logits


def test_a_template_that_rewrites_what_was_said_is_read_from_where_it_differs(
    loaded: Loaded,
) -> None:
    conversation = Conversation(loaded, GREEDY)
    "".join(conversation.reply("one"))
    conversation.messages[-1]["content"] = "OH"  # as templates that drop a reply's thoughts do
    loaded.feeds.clear()
    assert "".join(conversation.reply("two")) == "TWO"
    assert loaded.feeds[0] == list(b"H\nU:two\nA:")


def test_a_reply_that_is_broken_off_is_kept_as_far_as_it_came(loaded: Loaded) -> None:
    conversation = Conversation(loaded, GREEDY)
    pieces = conversation.reply("hello")
    assert next(pieces) + next(pieces) == "HE"
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "HE"}
    assert "".join(conversation.reply("you")) == "YOU"


def test_a_full_context_says_reset(loaded: Loaded) -> None:
    loaded.context = 30
    conversation = Conversation(loaded, GREEDY)
    assert "".join(conversation.reply("x" * 12)) == "X" * 12
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"has 44 tokens .* context is 30: /reset starts again"):
        "".join(conversation.reply("and so on"))
    assert conversation.messages == before
    conversation.reset()
    assert (
        "".join(conversation.reply("y" * 18)) == "Y" * 8
    )  # 23 tokens of prompt, 7 read after them, and the last is not read
    assert conversation.figures.ended == "context"


def test_limits(loaded: Loaded) -> None:
    conversation = Conversation(loaded, GREEDY, max_tokens=4, stop=["CAKE"])
    assert (
        "".join(conversation.reply("abcdef")) == "ABCD" and conversation.figures.ended == "tokens"
    )
    conversation = Conversation(loaded, GREEDY, stop=["CAKE"])
    assert (
        "".join(conversation.reply("eat cake now")) == "EAT "
        and conversation.figures.ended == "stop"
    )
    assert "".join(conversation.reply("eat ca")) == "EAT CA"


def test_no_template_is_refused_at_once(loaded: Loaded) -> None:
    loaded.tokenizer = load_tokenizer("bytes")
    with pytest.raises(UserError, match="model's tokenizer has no chat template") as error:
        Conversation(loaded, GREEDY)
    assert "\n" not in str(error.value)


# The loop.


def talk(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, text: str, show: bool | None = None
) -> Conversation:
    """A chat through a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    writer = ReasoningWriter(show)
    conversation = Conversation(loaded, GREEDY, reasoning=writer)
    run_chat(conversation, loaded.context, writer)
    return conversation


def test_a_pipe_gets_replies_on_stdout_and_the_rest_on_stderr(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(
        loaded, monkeypatch, "one\n\n/help\n/reset\n/nonsense\n  two  \n/quit\nthree\n"
    )
    out, err = capsys.readouterr()
    assert out == "ONE\nTWO\n"
    assert "/quit    leave" in err and "/nonsense is no command" in err and "forgotten" in err
    assert err.count("tokens/s") == 4 and "generated 3 tokens" in err
    assert len(conversation.messages) == 2


def test_the_end_of_a_pipe_ends_the_chat_and_a_path_is_no_command(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(loaded, monkeypatch, "/usr/bin or\nlast")
    assert capsys.readouterr().out == "/USR/BIN OR\nLAST\n"


def test_a_full_context_does_not_end_the_chat(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded.context = 30
    talk(loaded, monkeypatch, f"{'x' * 40}\nhi\n{'y' * 14}\n/reset\n{'y' * 8}\n")
    out, err = capsys.readouterr()
    assert out == "HI\n" + "Y" * 2 + "\n" + "Y" * 8 + "\n"
    assert err.count("/reset starts again") == 2 and "the context of 30 tokens is full" in err


def test_ctrl_c_stops_the_reply_and_not_the_chat(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(tokens: list[int]) -> int:
        if tokens[-3:] == list(b"A:L"):
            signal.raise_signal(signal.SIGINT)
        return shout(tokens)

    loaded.speak = interrupted
    before = signal.getsignal(signal.SIGINT)
    conversation = talk(loaded, monkeypatch, "long story\nshort\n")
    out, err = capsys.readouterr()
    assert out == "LO\nSHORT\n" and err.count("interrupted") == 1
    assert conversation.messages[1]["content"] == "LO"
    assert signal.getsignal(signal.SIGINT) == before


def test_in_a_pipe_a_second_ctrl_c_ends_it(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(tokens: list[int]) -> int:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return shout(tokens)

    loaded.speak = stuck
    with pytest.raises(KeyboardInterrupt):
        talk(loaded, monkeypatch, "long\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_at_a_terminal_ctrl_c_clears_the_line_and_ctrl_d_leaves(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["hi", KeyboardInterrupt(), "you", EOFError()])

    def input_(prompt: str) -> str:
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", input_)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_chat(Conversation(loaded, GREEDY), loaded.context, ReasoningWriter(None))
    assert capsys.readouterr().out == "HI\n\nYOU\n\n"


def at_a_terminal(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Stdin and stdout of a person who types these lines, then Ctrl-D."""
    typed = iter(lines)

    def input_(prompt: str) -> str:
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", input_)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def test_at_a_terminal_a_second_ctrl_c_does_not_lose_the_conversation(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stuck(tokens: list[int]) -> int:
        if tokens[-3:] == list(b"A:L"):
            signal.raise_signal(signal.SIGINT)
            assert "The reply stops after this token" in capsys.readouterr().err
            signal.raise_signal(signal.SIGINT)
        return shout(tokens)

    loaded.speak = stuck
    at_a_terminal(monkeypatch, "one", "long", "two")
    conversation = Conversation(loaded, GREEDY)
    run_chat(conversation, loaded.context, ReasoningWriter(None))
    out, err = capsys.readouterr()
    assert out.endswith("\nTWO\n\n") and "what was said before is kept" in err
    assert [message["content"] for message in conversation.messages] == [
        *("one", "ONE"),
        *("long", "L"),
        *("two", "TWO"),
    ]


# What it thinks.


def thinking(tokens: list[int]) -> int:
    """Thinks, then shouts."""
    thought = b"<think>hm</think>\n\n"
    line = bytes(tokens).rpartition(b"\nA:")[2]
    if thought.startswith(line) and line != thought:
        return thought[len(line)]
    return shout([token for token in bytes(tokens).replace(thought, b"")])


def test_thoughts_are_not_part_of_the_reply(loaded: Loaded) -> None:
    thoughts: list[str] = []
    loaded.speak = thinking
    conversation = Conversation(loaded, GREEDY, reasoning=thoughts.append)
    assert "".join(conversation.reply("one")) == "ONE"
    assert "".join(thoughts) == "hm"
    assert conversation.messages[-1] == {"role": "assistant", "content": "ONE"}
    loaded.feeds.clear()
    assert "".join(conversation.reply("two")) == "TWO"
    # What it thought is not read again.
    assert bytes(loaded.feeds[0]) == b"ONE\nU:two\nA:"


def test_a_reply_without_an_answer_is_not_remembered(loaded: Loaded) -> None:
    loaded.speak = thinking
    conversation = Conversation(loaded, GREEDY, max_tokens=9)
    assert "".join(conversation.reply("one")) == ""
    assert conversation.messages == []


@pytest.mark.parametrize(("show", "shown"), [(True, "hm\n"), (None, ""), (False, "")])
def test_thoughts_are_shown_apart(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    show: bool | None,
    shown: str,
) -> None:
    loaded.speak = thinking
    talk(loaded, monkeypatch, "one\n", show)
    out, err = capsys.readouterr()
    assert out == "ONE\n" and err.startswith(f"{shown}prompt ")


def test_on_a_terminal_thoughts_are_dim(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded.speak = thinking
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    talk(loaded, monkeypatch, "one\n")
    out, err = capsys.readouterr()
    assert out == "ONE\n" and err.startswith("\033[2mh\033[0m\033[2mm\033[0m\n")


def test_a_reply_that_ends_in_a_thought_says_so(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    thought = b"<think>hm"
    loaded.speak = lambda tokens: [*thought, END][len(bytes(tokens).rpartition(b"A:")[2])]
    talk(loaded, monkeypatch, "one\n")
    assert "ended before its answer: raise --max-tokens" in capsys.readouterr().err


def test_options_reach_the_template(loaded: Loaded) -> None:
    template = TemplateOptions(None, {"reply": "B:"})
    conversation = Conversation(loaded, GREEDY, template=template)
    loaded.speak = lambda tokens: END
    "".join(conversation.reply("one"))
    assert bytes(loaded.feeds[0]) == b"U:one\nB:"
    with pytest.raises(UserError, match="--template-kwargs mood"):
        Conversation(loaded, GREEDY, template=TemplateOptions(None, {"mood": 1}))


# Templates of a folder.

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if "
    "add_generation_prompt %}[reply]{% endif %}"
)


def with_template(folder: Path, template: str) -> Path:
    save_folder(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template, "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_folders_template_is_rendered(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(with_template(tmp_path / "saved", PLAIN)))
    assert tokenizer.chat is not None
    ids = tokenizer.chat.prompt(
        [{"role": "system", "content": "be\ud800"}, {"role": "user", "content": "the dog"}]
    )
    assert ids == tokenizer.encode("[system]be?[user]the dog[reply]")
    assert tokenizer.bos_id == 0
    assert tokenizer.encode_prompt("the dog") == [
        0,
        *tokenizer.encode("the dog"),
    ]  # nothing cut off or padded


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    assert load_tokenizer(str(save_folder(tmp_path / "saved"))).chat is None
    plain = load_tokenizer("bytes")
    assert plain.chat is None and plain.bos_id is None and plain.encode_prompt("ab") == [97, 98]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # what the sandbox is there for
        "{{ messages.append(1) }}",
        "{% for m in messages %}",
        "{{ raise_exception('only users may speak') }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_one_sentence(template: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(with_template(tmp_path / "saved", template)), "tokenizer")
    assert tokenizer.chat is not None
    with pytest.raises(
        UserError,
        match=r"tokenizer=.*its chat template (refuses these messages|is not Jinja) \(.+\)",
    ) as error:
        tokenizer.chat.prompt([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


def test_templates_need_jinja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(with_template(tmp_path / "saved", PLAIN)))
    replace_import(monkeypatch, "jinja2")
    assert tokenizer.chat is not None
    with pytest.raises(UserError, match="needs the `jinja2` package: pip install"):
        tokenizer.chat.prompt([{"role": "user", "content": "hi"}])
