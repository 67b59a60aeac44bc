"""The front end as a process beside a server, as `twotower serve --openai` starts it.

The first line of its standard input says how; it prints its port, and ends with its standard input.
"""

from __future__ import annotations

import os
import signal
import ssl
import sys
import threading
from pathlib import Path

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.http_door import read_order
from twotower_client.openai.app import Settings, make_app
from twotower_client.openai.chat import read_template
from twotower_client.openai.serving import run


def main() -> None:
    """Serve until standard input ends."""
    given, access = read_order()
    key, files, tls = given.get("key"), given.get("tls"), {}
    if files is not None:
        tls = {"ssl_certfile": files["certificate"], "ssl_keyfile": files["key"]}
        if files["clients"]:
            tls |= {"ssl_ca_certs": files["clients"], "ssl_cert_reqs": ssl.CERT_REQUIRED}
    settings = Settings(
        "twotower",
        api_keys=(key,) if key else (),
        template=read_template(Path(given["tokenizer"])),
    )
    app = make_app(lambda: AsyncTwoTowerClient(given["grpc"], **access), settings)
    threading.Thread(target=_end_with_input, daemon=True).start()
    run(app, given["host"], given["port"], _tell_port, **tls)


def _tell_port(address: str) -> None:
    print(address.rpartition(":")[2], flush=True)


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
