"""The verb `twotower openai`: OpenAI's HTTP interface for a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from twotower_client.access_cli import access_options, secrets_of
from twotower_client.errors import RequestRefusedError
from twotower_contract.command_line import OPENAI_PORT

KEYS_VARIABLE = "TWOTOWER_API_KEYS"
EPILOG = """\b
Examples:
  twotower openai --url localhost:8001
  twotower openai --url localhost:8001 --port 9000 --api-key-file keys.txt
  curl localhost:9000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "twotower", "prompt": "Mia the fox", "max_tokens": 48}'

A page at http://localhost:9000/ shows answers as they are denoised.
"""


@click.command(epilog=EPILOG)
@access_options
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=int, default=OPENAI_PORT, help="Port of HTTP; 0 takes a free one.")
@click.option("--model", default="twotower", help="Name of the model for callers.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help=f"File of keys, one a line; callers must give one.  [env: {KEYS_VARIABLE}, with commas]",
)
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path, exists=True),
    help="Jinja file, or folder with a tokenizer, that makes a prompt of chat messages.",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    default=256,
    help="Most requests under way; others are answered with status 429.",
)
@click.option(
    "--max-body", type=click.IntRange(min=1), default=1 << 20, help="Most bytes of a request."
)
@click.option("--timeout", type=float, default=300, help="Seconds that an answer may take.")
def openai(
    url: str,
    host: str,
    port: int,
    model: str,
    api_key_file: Path | None,
    chat_template: Path | None,
    max_concurrency: int,
    max_body: int,
    timeout: float,
    **files: Any,
) -> None:
    """Serve OpenAI's interface over HTTP, in front of a running server."""
    from twotower_client.aio import AsyncTwoTowerClient
    from twotower_client.openai.app import Settings, make_app
    from twotower_client.openai.chat import read_template
    from twotower_client.openai.serving import run

    template = read_template(chat_template) if chat_template is not None else None
    if chat_template is not None and template is None:
        raise RequestRefusedError(f"{chat_template}: holds no chat template")
    settings = Settings(
        model,
        api_keys=_keys(api_key_file),
        max_body=max_body,
        max_concurrency=max_concurrency,
        template=template,
    )
    access = {"timeout": timeout, **secrets_of(**files)}
    AsyncTwoTowerClient(url, **access)  # a wrong address is told now
    app = make_app(lambda: AsyncTwoTowerClient(url, **access), settings)
    run(app, host, port, lambda address: print(f"ready http={address}", flush=True))


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the keys that are asked for."""
    text = os.environ.get(KEYS_VARIABLE, "").replace(",", "\n")
    if path is not None:
        text = path.read_text(encoding="utf-8")
    keys = tuple(filter(None, map(str.strip, text.splitlines())))
    if path is not None and not keys:
        raise RequestRefusedError(f"{path}: holds no key; give one a line")
    return keys
