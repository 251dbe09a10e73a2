"""Random requests to a server for as long as you like, many of which go away. Each answer is
checked.

    moe-jax serve MODEL --port 8000 --max-batch 16
    python scripts/soak.py http://127.0.0.1:8000 --seconds 3600 --concurrency 24

Every question is first asked alone. From then on clients ask for a random question and a random
number of tokens, as a stream or whole, and a third of them close the connection somewhere on the
way. What they get must begin as the answer of the question asked alone: greedy ones and those
sampled with a seed, token by token with the log-probability of each, or as text.

Wrong are (exit code 1): an answer that differs, one that fails, memory of the server that grows by
more than 2% after the first quarter of the time, and a slot that is not free when all is over. It
needs nothing but the standard library and, for memory, a server on Linux, which tells
`process_resident_memory_bytes`.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moe_jax.errors import UserError
from moe_jax.serving.keys import read_keys
from moe_jax.serving.load import ServerUnderLoad

GROWTH = 0.02  # of memory, that is allowed
GONE = 1 / 3  # of the clients close the connection on the way
LEAVES = 0.3  # seconds after which some of them have gone, who may still wait for a slot
UNFINISHED = "�"  # the end of a text that breaks off within a character
FREE_SECONDS = 60.0  # within which all slots must be free at the end


class Question(NamedTuple):
    """What is asked for, and the answer of a server that had nothing else to do."""

    body: dict[str, Any]
    text: str
    tokens: list[str]
    logprobs: list[float]


class Sizes(NamedTuple):
    """How much is asked for."""

    questions: int = 12
    longest_prompt: int = 200
    longest_answer: int = 64


@dataclass
class Soak:
    """What happened; `run` makes it happen."""

    target: ServerUnderLoad
    sizes: Sizes = field(default_factory=Sizes)
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Bytes of the server: after the first quarter of the time, then at the end."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float, concurrency: int) -> None:
        """Asks for so long, with so many clients."""
        questions = self._ask_alone()
        began = time.monotonic()
        ends = began + seconds
        with ThreadPoolExecutor(concurrency) as threads:
            clients = [
                threads.submit(self._client, questions, ends, number)
                for number in range(concurrency)
            ]
            time.sleep(seconds / 4)
            self.memory.append(self.figure("process_resident_memory_bytes"))
            for client in clients:
                client.result()
        self._look_for_lost_slots()
        self.memory.append(self.figure("process_resident_memory_bytes"))
        if self.growth > GROWTH:
            sizes = " to ".join(f"{size / 2**20:,.1f} MiB" for size in self.memory)
            self.wrong.append(f"memory grew by {self.growth:.1%}: from {sizes}")

    @property
    def growth(self) -> float:
        """Of the server's memory, as a fraction."""
        first, last = self.memory
        return last / first - 1

    def figure(self, name: str) -> float:
        """A figure of the server's metrics, summed over its labels."""
        response = self.target.send("GET", "/metrics")
        lines = [line for line in response.read().decode().splitlines() if line[:1] != "#"]
        values = [line.split()[-1] for line in lines if line.split("{")[0].split()[0] == name]
        if not values:
            raise UserError(f"{self.target.url}/metrics does not have {name}.")
        return sum(map(float, values))

    def _ask_alone(self) -> list[Question]:
        draw = random.Random(self.seed)
        model = self.target.ask("GET", "/v1/models")["data"][0]["id"]
        sample = {"model": model, "prompt": "".join(map(chr, range(33, 127)))}
        known = self.target.ask("POST", "/tokenize", sample)["tokens"]
        beginning = draw.choices(known, k=self.sizes.longest_prompt)
        questions = []
        for number in range(self.sizes.questions):
            length = draw.randint(1, self.sizes.longest_prompt)
            own = draw.choices(known, k=draw.randint(1, length))
            body = {"model": model, "prompt": beginning[: length - len(own)] + own}
            body |= {"ignore_eos": True, "temperature": 0.0}
            if number % 3 == 2:
                body |= {"temperature": 1.0, "top_p": 0.9, "seed": number}
            asked = body | {"max_tokens": self.sizes.longest_answer, "logprobs": 0}
            choice = self.target.ask("POST", "/v1/completions", asked)["choices"][0]
            told = choice["logprobs"]
            questions.append(Question(body, choice["text"], told["tokens"], told["token_logprobs"]))
        return questions

    def _client(self, questions: list[Question], ends: float, number: int) -> None:
        draw = random.Random(f"{self.seed} {number}")
        while time.monotonic() < ends and not self.wrong:
            question = draw.choice(questions)
            tokens = draw.randint(1, self.sizes.longest_answer)
            gone = draw.random() < GONE
            body = question.body | {"max_tokens": tokens, "stream": gone or draw.random() < 0.8}
            if draw.random() < 0.5:
                body["logprobs"] = 0
            outcome = None
            try:
                if gone and draw.random() < 0.3:  # before it has heard anything
                    with closing(self.target.open("POST", "/v1/completions", body)):
                        time.sleep(draw.random() * LEAVES)
                else:
                    outcome = self._ask(question, body, draw.randint(0, tokens) if gone else None)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                outcome = f"an answer broke off: {type(error).__name__}: {error}"
            with self._lock:
                self.counts["gone" if gone else "whole"] += 1
                if outcome is not None:
                    self.wrong.append(outcome)

    def _ask(self, question: Question, body: dict[str, Any], events: int | None) -> str | None:
        """What is wrong with an answer, which is read to the end or for so many events."""
        with self.target.send("POST", "/v1/completions", body) as response:
            if response.status != 200:
                return f"status {response.status}: {response.read()[:200]!r}"
            text, tokens, logprobs, whole = "", [], [], False
            chunks = _chunks(response) if body["stream"] else iter([json.load(response)])
            for count, chunk in enumerate(chunks):
                if count == events:
                    break
                choice = chunk["choices"][0]
                text += choice["text"]
                whole = choice["finish_reason"] is not None
                if (told := choice["logprobs"]) is not None:
                    tokens += told["tokens"]
                    logprobs += told["token_logprobs"]
        length = body["max_tokens"]
        with self._lock:
            self.counts["tokens"] += len(tokens)
        if not question.text.startswith(text.rstrip(UNFINISHED)):
            return f"{text!r} is not how {question.text!r} begins"
        if "logprobs" in body:
            count = length if whole else len(tokens)
            wanted = question.tokens[:count], question.logprobs[:count]
            if (tokens, logprobs) != wanted:
                return f"tokens {tokens} of {length} are not {wanted[0]}, or less likely"
        return None if whole or events is not None else f"an answer of {length} tokens has no end"

    def _look_for_lost_slots(self) -> None:
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        ends = time.monotonic() + FREE_SECONDS
        while any(busy := [self.figure(name) for name in names]) and time.monotonic() < ends:
            time.sleep(0.1)
        if any(busy):
            self.wrong.append(f"{busy[0]:g} slots are not free and {busy[1]:g} requests wait")


def _chunks(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The chunks of a stream."""
    for line in iter(response.readline, b""):
        content = line.removeprefix(b"data:").strip()
        if content == b"[DONE]":
            return
        if content:
            yield json.loads(content)
    raise ValueError("the stream broke off")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Ask a server at random, and check each answer.")
    parser.add_argument("url", metavar="URL", help="as http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S")
    parser.add_argument("--concurrency", type=int, default=24, metavar="N", help="clients")
    parser.add_argument("--longest-prompt", type=int, default=200, metavar="N", help="in tokens")
    parser.add_argument("--longest-answer", type=int, default=64, metavar="N", help="in tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        key = None if chosen.api_key_file is None else read_keys(chosen.api_key_file)[0].decode()
        sizes = Sizes(longest_prompt=chosen.longest_prompt, longest_answer=chosen.longest_answer)
        soak = Soak(ServerUnderLoad(chosen.url, key), sizes, chosen.seed)
        soak.run(chosen.seconds, chosen.concurrency)
    except UserError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2
    for wrong in soak.wrong[:5]:
        print(f"wrong: {wrong}")
    print(
        f"{soak.counts['whole']:,} answers whole, {soak.counts['gone']:,} clients gone, "
        f"{soak.counts['tokens']:,} tokens compared; memory {soak.memory[-1] / 2**20:,.1f} MiB, "
        f"{soak.growth:+.2%}; {len(soak.wrong)} wrong"
    )
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
