"""The processes that speak HTTP beside a server: Triton's paths, and OpenAI's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from twotower_engines.errors import ServingError
from twotower_engines.serving.launch import ServerOptions, name_of

# By name: the engines import no client.
MODULES = {"http": "twotower_client.http_door", "openai": "twotower_client.openai.beside"}


class Front:
    """Runs a process, and starts it again where it ended.

    Args:
        kind: Which of `MODULES`.
        options: Those of the server.
        port: Port of HTTP; 0 for any free one.
        grpc_address: `host:port` of the server.
        tokenizer: Folder whose tokenizer may have a chat template.

    Raises:
        ServingError: It did not start.
    """

    def __init__(
        self, kind: str, options: ServerOptions, port: int, grpc_address: str, tokenizer: Path
    ) -> None:
        self._kind = kind
        self._given: dict[str, Any] = {
            "tokenizer": str(tokenizer),
            "host": options.host,
            "port": port,
            "grpc": grpc_address,
            "key": options.access_key,
        }
        tls = options.tls
        if tls is not None:
            files = {name: getattr(tls, name) for name in ("certificate", "key", "clients")}
            self._given["tls"] = {name: file and str(file) for name, file in files.items()}
            self._given["name"] = name_of(tls.certificate)
        self._start()
        host = options.host
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{self._given['port']}"

    def look_after(self) -> str | None:
        """Start the process again where it ended; return what was wrong, if anything."""
        code = self._process.poll()
        if code is None:
            return None
        self._start()
        return f"the process of {self._kind} ended with exit code {code}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> None:
        command = [sys.executable, "-m", MODULES[self._kind]]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(self._given).encode() + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ServingError(f"{self._kind} could not be served; the reason stands above")
        self._given["port"] = int(line)
