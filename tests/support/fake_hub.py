"""A Hugging Face hub on this machine: enough of its protocol for huggingface_hub to list, describe
and download the models of local folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

COMMIT = "c0ffee" + "0" * 34
PATHS = {
    "info": r"/api/models/(?P<model>[^/]+/[^/]+)/revision/main",
    "tree": rf"/api/models/(?P<model>[^/]+/[^/]+)/tree/{COMMIT}",
    "file": rf"/(?P<model>[^/]+/[^/]+)/resolve/{COMMIT}/(?P<file>.+)",
}


class Request(NamedTuple):
    """What was asked for."""

    method: str
    path: str
    range: str | None


class FakeHub:
    """`models` are the folders by name; a name in `gated` is refused; `requests` were made."""

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.requests: list[Request] = []

    def fetched(self, file: str) -> list[Request]:
        """The requests that gave bytes of the files whose name ends so."""
        return [one for one in self.requests if one.method == "GET" and one.path.endswith(file)]


@contextlib.contextmanager
def fake_hub(cache: Path) -> Iterator[FakeHub]:
    """A hub that huggingface_hub uses, with a cache of its own, as if HF_ENDPOINT and HF_HUB_CACHE
    were set; when it ends, nothing answers any more.
    """
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with hub_at(f"http://127.0.0.1:{server.server_port}", cache):
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


@contextlib.contextmanager
def hub_at(address: str, cache: Path, *, offline: bool = False) -> Iterator[None]:
    """huggingface_hub as if HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE were set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        # which it reads from the environment when it is imported
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        resolve = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address + resolve)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        yield


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path, asked = self.path.partition("?")[0], self.headers.get("Range")
            hub.requests.append(Request(self.command, path, asked))
            headers, content, status = _response(hub, path), b"", 200
            if isinstance(headers, bytes):
                content, headers = headers, {"X-Repo-Commit": COMMIT}
                headers["ETag"] = hashlib.sha256(content).hexdigest()
                if asked is not None:
                    first, last = (int(place) for place in asked[len("bytes=") :].split("-"))
                    content, status = content[first : last + 1], 206
            else:
                status = 403 if headers["X-Error-Code"] == "GatedRepo" else 404
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    return Handler


def _response(hub: FakeHub, path: str) -> bytes | dict[str, str]:
    """What a path gives, or the headers of a refusal."""
    found = [(kind, match) for kind, form in PATHS.items() if (match := re.fullmatch(form, path))]
    if not found:
        return {"X-Error-Code": "EntryNotFound"}
    kind, match = found[0]
    if match["model"] in hub.gated:
        return {"X-Error-Code": "GatedRepo"}
    folder = hub.models.get(match["model"])
    if folder is None:
        return {"X-Error-Code": "RepoNotFound"}
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    if kind == "info":
        siblings = [{"rfilename": name} for name in names]
        return json.dumps({"id": match["model"], "sha": COMMIT, "siblings": siblings}).encode()
    if kind == "tree":
        tree = [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
            for name, file in zip(names, files, strict=True)
        ]
        return json.dumps(tree).encode()
    if match["file"] not in names:
        return {"X-Error-Code": "EntryNotFound"}
    return (folder / match["file"]).read_bytes()
