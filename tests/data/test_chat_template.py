"""Conversations as tokens: which of them the assistant says, what ends a turn, and what a template
is told. The templates are those of well-known models.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_jax.data.chat_template import ChatTemplate
from moe_jax.data.tokenizer import Tokenizer, load_tokenizer
from moe_jax.errors import UserError
from tests.support import tokenizers as made

QUESTION, ANSWER = (
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "sleeps"},
)
TWICE = [
    QUESTION,
    ANSWER,
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "lazy"},
]
TEMPLATES = {
    "chatml": (made.CHATML, made.CHATML_TOKENS),
    "qwen3": (made.QWEN3, made.CHATML_TOKENS),
    "llama2": (made.LLAMA2, ["</s>"]),
    "harmony": (made.HARMONY, made.HARMONY_TOKENS),
    "spoken": (made.SPOKEN, []),
    "glm": (made.GLM, ["<|user|>", "<|assistant|>"]),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """The tokenizer with a template of `TEMPLATES`, each made once."""
    made_before: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in made_before:
            folder = Path(tmp_path_factory.mktemp("chat")) / name
            made_before[name] = load_tokenizer(str(made.chat_folder(folder, *TEMPLATES[name])))
        return made_before[name]

    return load


def chat(tokenizer: Tokenizer) -> ChatTemplate:
    assert tokenizer.chat is not None
    return tokenizer.chat


def said(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str]:
    """The text of each run of tokens that count."""
    ids, counts = chat(tokenizer).conversation(messages)
    assert ids == tokenizer.encode(chat(tokenizer).render(messages, False, {}))
    names = {number: name for name, number in chat(tokenizer).tokens.items()}
    runs, before = [""], False
    for token, count in zip(ids, counts, strict=True):
        if count:
            runs[-1] += names.get(token) or tokenizer.decode([token])
        elif before:
            runs.append("")
        before = count
    return [run for run in runs if run]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", ["sleeps<|im_end|>", "lazy<|im_end|>"]),
        # What a model says itself counts, so the thought that is empty does.
        ("qwen3", ["sleeps<|im_end|>", "<think>\n\n</think>\n\nlazy<|im_end|>"]),
        ("llama2", [" sleeps </s>", " lazy </s>"]),
        (
            "harmony",
            [
                "<|channel|>final<|message|>sleeps<|end|>",
                "<|channel|>final<|message|>lazy<|return|>",
            ],
        ),
        ("spoken", [" sleeps", " lazy"]),
        ("glm", ["\nsleeps<|user|>", "\nlazy"]),  # its models end a turn by beginning the user's
    ],
)
def test_what_the_assistant_says_counts_and_the_end_of_its_turn(name: str, wanted, load) -> None:
    assert said(load(name), TWICE) == wanted


def test_what_the_assistant_thought_counts_where_the_template_writes_it(load) -> None:
    messages = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsleeps"}]
    assert said(load("qwen3"), messages) == ["<think>\nhm\n</think>\n\nsleeps<|im_end|>"]


def test_text_that_is_said_twice_counts_where_the_assistant_says_it(load) -> None:
    messages = [{"role": "user", "content": "sleeps"}, ANSWER, QUESTION]
    assert said(load("chatml"), messages) == ["sleeps<|im_end|>"]
    assert said(load("chatml"), [QUESTION]) == []
    blank = [QUESTION, {"role": "assistant", "content": "  sleeps\n"}]  # which the template trims
    assert said(load("chatml"), blank) == ["sleeps<|im_end|>"]


CALLING = made.CHATML.replace(
    "<|im_end|>\n{% endfor",
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.name }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor",
)


def test_calls_of_tools_are_turns_of_the_assistant(tmp_path: Path, load) -> None:
    folder = made.chat_folder(tmp_path / "x", CALLING, made.CHATML_TOKENS)
    tokenizer = load_tokenizer(str(folder))
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "bark"}]}
    result = {"role": "tool", "content": "loud"}
    assert said(tokenizer, [QUESTION, call, result, ANSWER]) == [
        "<tool_call>bark</tool_call><|im_end|>",
        "sleeps<|im_end|>",
    ]
    both = call | {"content": "wait"}
    assert said(tokenizer, [QUESTION, ANSWER, QUESTION, both, result, call]) == [
        "sleeps<|im_end|>",
        "wait<tool_call>bark</tool_call><|im_end|>",
        "<tool_call>bark</tool_call><|im_end|>",
    ]
    with pytest.raises(UserError, match="its turns are not found"):  # nothing shows where it ends
        chat(load("spoken")).conversation([QUESTION, call])


def test_what_is_put_in_front_of_a_thought_is_not_said_and_the_thought_is(tmp_path: Path) -> None:
    """Templates that begin the thought in the prompt, as those of Qwen3-Thinking and QwQ do."""
    template = made.QWEN3.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert template != made.QWEN3
    folder = made.chat_folder(tmp_path / "x", template, made.CHATML_TOKENS)
    messages = [QUESTION, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsleeps"}]
    assert said(load_tokenizer(str(folder)), messages) == [
        "<think>\nhm\n</think>\n\nsleeps<|im_end|>"
    ]


def test_several_tokens_may_end_a_turn(tmp_path: Path) -> None:
    """As in Command R7B: the first of them ends a reply."""
    template = made.CHATML.replace("<|im_end|>", "<|response_end|><|im_end|>")
    folder = made.chat_folder(tmp_path / "x", template, [*made.CHATML_TOKENS, "<|response_end|>"])
    tokenizer = load_tokenizer(str(folder))
    assert chat(tokenizer).end_id == chat(tokenizer).tokens["<|response_end|>"]
    assert said(tokenizer, TWICE) == [
        "sleeps<|response_end|><|im_end|>",
        "lazy<|response_end|><|im_end|>",
    ]


def test_a_template_that_hides_what_is_said_is_refused(tmp_path: Path) -> None:
    hiding = "{% for m in messages %}{{ m.content[::-1] ~ m.content | length }}{% endfor %}"
    tokenizer = load_tokenizer(str(made.chat_folder(tmp_path / "x", hiding, [])))
    with pytest.raises(UserError, match=r"its turns are not found: set data\.loss_on=all"):
        chat(tokenizer).conversation(TWICE)
    silent = made.chat_folder(tmp_path / "y", "{% for m in messages %}{{ m.role }}{% endfor %}", [])
    with pytest.raises(UserError, match="its turns are not found"):
        chat(load_tokenizer(str(silent))).conversation(TWICE)


def test_a_template_that_is_cut_short_is_not_said_to_refuse_a_role(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(made.chat_folder(tmp_path / "x", "{{ messages ", [])))
    with pytest.raises(UserError, match=r"its chat template is not Jinja .*download it again"):
        chat(tokenizer).prompt([{"role": "user", "content": "Hi"}])


def test_a_template_that_writes_nothing_is_not_an_empty_prompt(tmp_path: Path) -> None:
    nothing = "{% for m in messages if m.role == 'tool' %}{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(str(made.chat_folder(tmp_path / "x", nothing, [])))
    with pytest.raises(UserError, match="its chat template makes no text of these messages"):
        chat(tokenizer).prompt([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("llama2", "</s>"),
        ("harmony", "<|return|>"),
        ("spoken", None),
        ("glm", None),
    ],
)
def test_what_ends_a_turn(name: str, end: str | None, load) -> None:
    tokenizer = load(name)
    assert chat(tokenizer).end_id == (None if end is None else chat(tokenizer).tokens[end])
    assert set(tokenizer.end_ids) == {tokenizer.eos_id, chat(tokenizer).end_id} - {None}


def test_the_end_of_a_channel_does_not_end_the_turn(tmp_path: Path) -> None:
    template = made.HARMONY.replace("<|return|>", "<|end|>")
    tokenizer = load_tokenizer(str(made.chat_folder(tmp_path / "x", template, made.HARMONY_TOKENS)))
    assert chat(tokenizer).end_id is None


def test_a_template_of_prompts_alone_says_nothing_of_turns(tmp_path: Path) -> None:
    template = "{% if messages | length > 1 %}{{ raise_exception('one!') }}{% endif %}hi"
    tokenizer = load_tokenizer(str(made.chat_folder(tmp_path / "x", template, [])))
    assert chat(tokenizer).end_id is None


def test_what_a_template_is_told(load) -> None:
    template = chat(load("chatml"))
    plain = template.render([QUESTION], True, {})
    assert template.thinking(False) == {"enable_thinking": False}
    assert template.prompt([QUESTION], enable_thinking=False) == load("chatml").encode(
        plain + "<think>\n\n</think>\n\n"
    )
    template.check_variables(["enable_thinking"])
    with pytest.raises(
        UserError, match=r"--template-kwargs mood=\.\.\.: the chat template does not"
    ):
        template.check_variables(["mood"])
    with pytest.raises(UserError, match=r"--template-kwargs messages=\.\.\."):
        template.check_variables(["messages"])
    with pytest.raises(UserError, match="--thinking off: the chat template has no switch"):
        chat(load("spoken")).thinking(False)
