"""A small Hugging Face hub on this machine: listings, downloads and ranges, with a count of what was sent.

Weights are served behind a redirection to another host name, as the real hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40


@dataclass
class Hub:
    """root: folders `org/name` with the files of repositories. sent: bytes by file. ranges: whether they are obeyed."""

    root: Path
    ranges: bool = True
    sent: dict[str, int] = field(default_factory=dict)
    tokens_elsewhere: int = 0
    url: str = ""
    store: str = ""

    def add(self, name: str, extra: int) -> None:
        self.sent[name] = self.sent.get(name, 0) + extra

    def weights_sent(self) -> int:
        return sum(size for name, size in self.sent.items() if name.endswith(".safetensors"))

    def env(self, home: Path) -> dict[str, str]:
        """For a process that is to ask this hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """The test looks at what was sent."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            folder, kind = self.hub.root / found[1], (found[2] or "").split("/")[1:2]
            if folder.is_dir():
                return self.reply(json.dumps(tree(folder) if kind == ["tree"] else listing(folder, found[1])).encode())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            file = self.hub.root / found[1] / found[2]
            if file.is_file() and file.suffix == ".safetensors":
                return self.redirect(file, f"{self.hub.store}/store/{found[1]}/{found[2]}")
            if file.is_file():
                return self.content(file, f"{found[1]}/{found[2]}")
        elif found := re.fullmatch(r"/store/(.+)", path):
            self.hub.tokens_elsewhere += "Authorization" in self.headers
            return self.content(self.hub.root / found[1], found[1])
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def redirect(self, file: Path, to: str) -> None:
        self.send_response(302)
        self.send_header("Location", to)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{sha256(file)}"')
        self.send_header("X-Linked-Size", str(file.stat().st_size))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def content(self, file: Path, name: str) -> None:
        whole = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.hub.ranges else None
        first = int(asked[1]) if asked else 0
        body = whole[first : int(asked[2]) + 1 if asked and asked[2] else None]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(whole)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{sha256(file)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.hub.add(name, len(body))
            self.wfile.write(body)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def listing(folder: Path, name: str) -> dict[str, object]:
    siblings = [
        {"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size, "blobId": sha256(p)[:40]}
        for p in files(folder)
    ]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}


def tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": str(p.relative_to(folder)),
            "size": p.stat().st_size,
            "oid": sha256(p)[:40],
            **(
                {"lfs": {"oid": sha256(p), "size": p.stat().st_size, "pointerSize": 134}}
                if p.suffix == ".safetensors"
                else {}
            ),
        }
        for p in files(folder)
    ]


@contextmanager
def serve(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), {"hub": hub}))
    hub.url, hub.store = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
