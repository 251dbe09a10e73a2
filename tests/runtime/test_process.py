"""What the command sets for its whole process."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.runtime import terminal
from moe_jax.runtime.process import prepare_process


@pytest.fixture(autouse=True)
def _own_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_the_compiler_is_quiet_unless_somebody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    prepare_process()
    assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == (
        None if Path("/dev/nvidiactl").exists() else "3"
    )
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "0")
    prepare_process()
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0"


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "na\u00efve \u4e13", b"na\\xefve \\u4e13"),
        ("latin-1", "na\u00efve \u4e13", b"na\xefve \\u4e13"),
        ("cp1252", "\u201c\u2502", b"\x93\\u2502"),
        ("utf-8", "na\u00efve \udcff", b"na\xc3\xafve \\udcff"),
    ],
)
def test_any_character_is_printed_and_what_is_escaped_is_said_once(
    encoding: str,
    text: str,
    written: bytes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal._say_what_is_escaped.cache_clear()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    prepare_process()
    for _ in range(2):
        print(text, end="", flush=True)
    assert raw.getvalue() == written * 2
    said = f"moe-jax: standard output is {encoding}; characters that it lacks are written as"
    assert capsys.readouterr().err.count(said) == (encoding != "utf-8")
