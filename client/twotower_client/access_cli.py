"""The options with which each verb reaches a server: its address, TLS, and its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_client.errors import RequestRefusedError
from twotower_contract.command_line import together

if TYPE_CHECKING:
    from twotower_client.client import TwoTowerClient

SECRETS = ("tls_authority", "tls_certificate", "tls_key", "key_file", "metadata")
ACCESS = ("url", *SECRETS)
FILE = click.Path(path_type=Path, dir_okay=False)


secret_options = together(
    click.option(
        "--tls-authority", type=FILE, help="Encrypt; this authority signed the server (PEM)."
    ),
    click.option("--tls-certificate", type=FILE, help="Our certificate, if it asks for one (PEM)."),
    click.option("--tls-key", type=FILE, help="Key of our certificate (PEM)."),
    click.option("--key-file", type=FILE, help="File that holds the server's access key."),
    click.option(
        "--metadata",
        multiple=True,
        metavar="NAME=VALUE",
        help="Send this header, as a balancer may ask for; may be given several times.",
    ),
)
"""Adds the options of TLS and the key to a verb, which hands their values to `secrets_of`."""

access_options = together(
    click.option(
        "--url",
        default="localhost:8001",
        help="host:port of the server's gRPC endpoint; several with commas for --input.",
    ),
    secret_options,
)
"""Adds these and the address to a verb, which hands their values to `connect`."""


def connect(access: Mapping[str, Any], **settings: Any) -> TwoTowerClient:
    """Return a client that reaches the server in the way that the options say.

    Args:
        access: Values of the options, by the names in `ACCESS`.
        **settings: As for `TwoTowerClient`.

    Raises:
        RequestRefusedError: A file is missing or cannot be read.
    """
    from twotower_client.client import TwoTowerClient

    secrets = secrets_of(**{name: access[name] for name in SECRETS})
    return TwoTowerClient(access["url"], **settings, **secrets)


def secrets_of(
    tls_authority: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    key_file: Path | None,
    metadata: Sequence[str],
) -> dict[str, Any]:
    """Return the arguments of a client that the options stand for.

    Raises:
        RequestRefusedError: A file is missing or cannot be read, or a header has no value.
    """
    import grpc

    if (tls_certificate is None) != (tls_key is None):
        raise RequestRefusedError("--tls-certificate and --tls-key belong together; give both")
    if tls_certificate is not None and tls_authority is None:
        raise RequestRefusedError("--tls-certificate is given without --tls-authority; give both")
    pairs = [one.partition("=") for one in metadata]
    for name, equals, _ in pairs:
        if not equals:
            raise RequestRefusedError(f"--metadata is {name!r}; give NAME=VALUE")
    contents = [one and _read(one) for one in (tls_authority, tls_key, tls_certificate)]
    return {
        "credentials": grpc.ssl_channel_credentials(*contents) if tls_authority else None,
        "metadata": {name: value for name, _, value in pairs},
        "access_key": _read(key_file).decode(errors="replace").strip() if key_file else None,
    }


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise RequestRefusedError(f"{file}: cannot be read ({problem.strerror})") from problem
