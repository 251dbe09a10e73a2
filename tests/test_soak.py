"""scripts/soak.py against the command itself: half a minute of it, or SOAK_SECONDS."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support import ROOT
from tests.support.fake_serving import FakeEngine, running, saying, serve
from tests.support.hf_folder import make_folder
from tests.support.schema_bodies import VALID, check_refusal, malformed_bodies

SECONDS = float(os.environ.get("SOAK_SECONDS", "25"))
STARTS = 600.0  # seconds within which the server must be ready


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    import soak

    yield soak
    sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.slow
def test_a_server_stands_random_clients_and_bodies(soak: Any, tmp_path: Path) -> None:
    """Quicker tests: tests/serving/test_engine.py, tests/serving/api/test_malformed.py."""
    folder = make_folder("qwen3_moe-plain", tmp_path / "model")
    options = ("--port", "0", "--max-batch", "4", "--max-context", "256")
    command = [sys.executable, "-m", "moe_jax", "serve", str(folder), *options]
    log = tmp_path / "log"
    with log.open("w") as kept:
        server = subprocess.Popen(command, stderr=kept, cwd=ROOT)
    try:
        ends = time.monotonic() + STARTS
        while "ready:" not in log.read_text() and server.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.1)
        address = re.findall(r"ready: .* at (http://[\d.:]+)", log.read_text())[0]
        target = soak.ServerUnderLoad(address)
        model = target.ask("GET", "/v1/models")["data"][0]["id"]
        with httpx2.Client(base_url=address, timeout=600) as client:
            for body in malformed_bodies(VALID | {"model": model}):
                check_refusal(client.post("/v1/completions", content=body))
        run = soak.Soak(target, soak.Sizes(questions=6, longest_prompt=150, longest_answer=40))
        run.run(SECONDS, 8)
        server.send_signal(signal.SIGTERM)
        assert server.wait(600) == 0
        assert run.wrong == [], (run.wrong[:3], run.memory)
        assert run.counts["gone"] > 10 and run.counts["tokens"] > 100, run.counts
        assert "Traceback" not in log.read_text() and " 500," not in log.read_text()
    finally:
        server.kill()


def test_what_is_wrong_is_found(soak: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose answers change, and one that holds on to what its clients have left."""
    engine = FakeEngine(saying("one and another"))
    with running(serve(engine)) as client:
        run = soak.Soak(soak.ServerUnderLoad(str(client.base_url)), soak.Sizes(2, 5, 8))
        alone = run._ask_alone

        def then_others() -> Any:
            found = alone()
            engine.say = saying("one AND another")
            return found

        run._ask_alone = then_others
        monkeypatch.setattr(soak, "FREE_SECONDS", 0.0)
        run.figure = lambda name: {"vllm:num_requests_running": 1.0}.get(name, 100.0)
        run.run(0.4, 2)
    assert any("is not how" in text or "are not" in text for text in run.wrong), run.wrong
    assert "1 slots are not free and 100 requests wait" in run.wrong
