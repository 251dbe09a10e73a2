"""The command as a person starts it, with a model, and the client that OpenAI publishes."""

from __future__ import annotations

import concurrent.futures
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support import ROOT
from tests.support.command import call
from tests.support.hf_folder import make_folder


@pytest.mark.slow
def test_the_command_serves_and_drains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder("qwen3_moe-plain", tmp_path / "model")
    assert call("generate", folder, "--prompt", "hello", "--max-tokens", 12, "--greedy") == 0
    expected = capsys.readouterr().out.rstrip("\n")
    server = subprocess.Popen(
        [sys.executable, "-m", "moe_jax", "serve", str(folder), "--port", "0", "--max-batch", "4"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert server.stderr is not None
        said = next(line for line in server.stderr if "ready:" in line)
        url = re.findall(r"http://[\d.:]+/v1", said)[0]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        name = client.models.list().data[0].id

        def ask(prompt: str, **options: Any) -> str:
            return (
                client.completions.create(
                    model=name, prompt=prompt, max_tokens=12, temperature=0, **options
                )
                .choices[0]
                .text
            )

        assert ask("hello") == expected
        prompts = ["hello", "once", "x"] * 4
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            crowd = list(threads.map(ask, prompts))
        assert crowd == [ask(prompt) for prompt in prompts]
        reply = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=8,
            response_format={"type": "json_object"},
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        assert text.startswith("{")
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
