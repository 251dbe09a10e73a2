"""Signals that are noted, and handlers that go with the block that set them."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from moe_jax.runtime.signals import (
    SAVE_SIGNALS,
    collected_signals,
    exit_on_sigterm,
    noted_signals,
    until_noted,
)


def test_the_first_is_noted_and_told_at_once_the_second_has_its_usual_effect() -> None:
    told: list[str] = []
    with noted_signals(signal.SIGINT, at_once=lambda: told.append("now")) as noted:
        assert not noted
        signal.raise_signal(signal.SIGINT)
        assert noted and told == ["now"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pieces_end_at_the_signal_and_their_generator_is_closed() -> None:
    closed: list[bool] = []

    def pieces() -> Iterator[str]:
        try:
            yield "a"
            signal.raise_signal(signal.SIGINT)
            yield "b"
            yield "c"
        finally:
            closed.append(True)

    with noted_signals(signal.SIGINT) as noted:
        assert list(until_noted(noted, pieces())) == ["a", "b"]
    assert closed == [True]


def test_sigterm_is_a_sentence_and_143_within_the_block_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, exit_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143 and "terminated" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_signals_are_collected_as_often_as_they_come_and_end_nothing() -> None:
    before = [signal.getsignal(number) for number in SAVE_SIGNALS]
    with collected_signals(*SAVE_SIGNALS) as received:
        for number in (*SAVE_SIGNALS, signal.SIGUSR1):
            signal.raise_signal(number)
        assert received == [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1]
        received.clear()
        signal.raise_signal(signal.SIGHUP)
        assert received == [signal.SIGHUP]
    assert [signal.getsignal(number) for number in SAVE_SIGNALS] == before
