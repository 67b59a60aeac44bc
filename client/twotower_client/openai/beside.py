"""The front end as a process beside a server, as `twotower serve --openai` starts it.

The first line of its standard input says how; it prints its port, and ends with its standard input.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import grpc

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.openai.app import Settings, make_app
from twotower_client.openai.chat import read_template
from twotower_client.openai.serving import run


def main() -> None:
    """Serve until standard input ends."""
    given = json.loads(sys.stdin.buffer.readline())
    key, files = given.get("key"), given.get("tls")
    credentials, tls = None, {}
    if files is not None:
        chain, secret = (Path(files[name]).read_bytes() for name in ("certificate", "key"))
        own = (secret, chain) if files["clients"] else ()
        credentials = grpc.ssl_channel_credentials(chain, *own)
        tls = {"ssl_certfile": files["certificate"], "ssl_keyfile": files["key"]}
        if files["clients"]:
            tls |= {"ssl_ca_certs": files["clients"], "ssl_cert_reqs": ssl.CERT_REQUIRED}
    settings = Settings(
        "twotower",
        api_keys=(key,) if key else (),
        template=read_template(Path(given["tokenizer"])),
    )

    def make_client() -> AsyncTwoTowerClient:
        name = given.get("name")
        access: dict[str, Any] = {"server_name": name, "access_key": key}
        return AsyncTwoTowerClient(given["grpc"], credentials=credentials, **access)

    threading.Thread(target=_end_with_input, daemon=True).start()
    run(make_app(make_client, settings), given["host"], given["port"], _tell_port, **tls)


def _tell_port(address: str) -> None:
    print(address.rpartition(":")[2], flush=True)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
