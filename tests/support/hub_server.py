"""A small stand-in for the Hugging Face hub: the few routes that a snapshot download asks.

The real hub cannot be reached from a test; the client that talks to this one is the real
`huggingface_hub`. Answers follow the hub's public HTTP interface: repository information, file
tree, and files with their commit and entity tag in the headers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    """Hands every request to the server that made the class."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub.answer(self)

    def do_HEAD(self):
        self.hub.answer(self)

    def log_message(self, *_):
        """Be quiet."""


class HubServer:
    """Serves one repository with one commit on `main`.

    Attributes:
        requests: counts of (method, file) of everything that was asked of `resolve`.
        broken: files whose download is cut off in the middle.
        refusal: status and headers of every answer, in place of the true one.
    """

    refusal: tuple[int, dict[str, str]] | None = None

    def __init__(self, id_: str, commit: str, folder: Path) -> None:
        self.id, self.commit, self.folder = id_, commit, folder
        self.requests: Counter[tuple[str, str]] = Counter()
        self.broken: set[str] = set()

        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        if self.refusal is not None:
            return self._send(handler, self.refusal[0], b"", self.refusal[1])
        path = handler.path.partition("?")[0]
        api = f"/api/models/{self.id}"
        if path in (f"{api}/revision/main", f"{api}/revision/{self.commit}"):
            return self._json(handler, {"id": self.id, "sha": self.commit, "siblings": []})
        if path in (f"{api}/tree/{self.commit}", f"{api}/tree/main"):  # the oldest client's
            return self._json(
                handler,
                [self._entry(one) for one in sorted(self.folder.rglob("*")) if one.is_file()],
            )
        if path.startswith(f"/{self.id}/resolve/{self.commit}/"):
            name = path.removeprefix(f"/{self.id}/resolve/{self.commit}/")
            return self._file(handler, name)
        missing = "RevisionNotFound" if path.startswith(f"{api}/revision/") else "RepoNotFound"
        return self._send(handler, 404, b"", {"X-Error-Code": missing})

    def _entry(self, file: Path) -> dict:
        content = file.read_bytes()
        digest, name = hashlib.sha1(content).hexdigest(), file.relative_to(self.folder).as_posix()
        return {"type": "file", "path": name, "size": len(content), "oid": digest}

    def _file(self, handler: BaseHTTPRequestHandler, name: str) -> None:
        self.requests[handler.command, name] += 1
        content = (self.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit}
        status = 200
        requested = handler.headers.get("Range")
        if requested:  # "bytes=FIRST-" or "bytes=FIRST-LAST"
            first, _, last = requested.removeprefix("bytes=").partition("-")
            end = int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        if handler.command == "GET" and name in self.broken:
            headers["Content-Length"] = str(len(content))
            self._send(handler, status, content[: len(content) // 2], headers)
            handler.close_connection = True
            return
        self._send(handler, status, content, headers)

    def _json(self, handler: BaseHTTPRequestHandler, value: object) -> None:
        self._send(handler, 200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
    ) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)
