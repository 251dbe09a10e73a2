"""What `moe-jax serve` refuses, before anything listens."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.support.command import call
from tests.support.fake_serving import until
from tests.support.hf_folder import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("qwen3_moe-plain", tmp_path_factory.mktemp("served") / "model")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says, in one sentence."""
    assert call("serve", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and "ready:" not in said.err
    return said.err.removeprefix("moe-jax: ")


def test_options_that_cannot_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, tmp_path / "none").startswith(f"{tmp_path / 'none'} does not exist")
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o644)
    told = refusal(capsys, folder, "--api-key-file", key)
    assert (
        told == f"--api-key-file {key} can be read by everybody on this machine: chmod 600 {key}.\n"
    )
    assert "has no data axis" in refusal(capsys, folder, "--mesh", "data=2")
    both = ("--context", 64, "--max-context", 64)
    assert "say the same" in refusal(capsys, folder, *both)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port} cannot be served" in refusal(capsys, folder, "--port", port)
        told = refusal(capsys, folder, "--host", "0.0.0.0", "--port", port)
        assert "everybody who reaches it can use the model" in told


def test_experts_that_cannot_move(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, folder, "--port", 0, "--balance-every", 100)
    assert told.startswith("--balance-every 100 moves experts between devices, and all are on one")
    told = refusal(capsys, folder, "--port", 0, "--balance-every", 100, "--expert-cache-size", 2)
    assert "with --expert-cache-size they are in the host's memory" in told
    told = refusal(capsys, folder, "--redundant-slots", 1)
    assert told.startswith("--redundant-slots 1 is for copies of busy experts, and without")


def test_what_does_not_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, folder, "--port", 0, "--max-context", 10**6)
    assert told.startswith("--max-context 1000000 exceeds the model's context of ")
    told = refusal(capsys, folder, "--port", 0, "--max-batch", 4096, "--memory", "20MiB")
    assert told.startswith("--max-batch 4096 and --max-context ") and "--memory allows" in told
    found = re.search(r"give --cache-tokens (\d+)", told)
    assert found is not None and 0 < int(found[1]) < 4096 * 64
    told = refusal(capsys, folder, "--port", 0, "--max-context", 64, "--cache-tokens", 63)
    assert told.startswith("--cache-tokens 63 must have room for one request")


def test_what_cannot_be_routed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("route", "ftp://x") == 2
    assert "ftp://x is no server's URL" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert call("route", "127.0.0.1:1", "--port", port) == 2
        assert f"--port {port} cannot be served" in capsys.readouterr().err


def test_a_router_ends_with_its_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def end() -> None:
        until(lambda: "noted_signals" in repr(signal.getsignal(signal.SIGTERM)))
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    assert call("route", "127.0.0.1:1", "127.0.0.1:2", "--port", 0) == 0
    ending.join()
    assert "ready: 2 servers behind http://127.0.0.1:" in capsys.readouterr().err
