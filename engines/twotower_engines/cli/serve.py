"""The verbs `twotower package` and `twotower serve`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.command_line import OPENAI_PORT
from twotower_contract.processes import told_to_end
from twotower_contract.progress import StatusLine
from twotower_engines.cli.options import opening_options, prefill_option
from twotower_engines.serving.settings import MAX_WAITING

if TYPE_CHECKING:
    from twotower_contract.engine_set import EngineSet
    from twotower_engines.serving.server import TritonServer

FILE = click.Path(path_type=Path, dir_okay=False)

PACKAGE_EPILOG = """\b
Examples:
  twotower package engines repository
  twotower package engines --sku h200 repository --slots 8 --checkpoint /data/twotower
"""

SERVE_EPILOG = """\b
Examples:
  twotower serve repository
  twotower serve repository --grpc-port 0 --no-metrics --json
  twotower serve repository --openai --http-port 8000
  twotower serve repository --host 0.0.0.0 --log server.log --grace 60
  twotower serve repository --tls-certificate server.pem --tls-key server.key --key-file key

When every model is ready, one line is printed on standard output, for example
`ready grpc=127.0.0.1:8001 metrics=127.0.0.1:8002 pid=4242 seconds=2.1`,
or with --json the same as an object; and another when the server was started again. A server whose
process dies or hangs is brought back. SIGTERM refuses new requests, lets those that are open end
within --grace seconds, and ends the server; Ctrl-C ends it at once, as a second signal does.
"""


@click.command(epilog=PACKAGE_EPILOG)
@click.argument("engines", type=click.Path(path_type=Path))
@click.argument("repo", type=click.Path(path_type=Path))
@opening_options
@click.option("--slots", type=int, help="Requests generated at once.  [all that the engines have]")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=MAX_WAITING,
    help="Requests that may wait for a slot before others are refused.",
)
@click.option(
    "--prefix-mib",
    type=click.IntRange(min=0),
    default=0,
    help="MiB that the states of prompts' beginnings may take; a prompt that begins as an earlier "
    "one starts sooner.",
)
@prefill_option
@click.option("--force", is_flag=True, help="Replace REPO whatever it holds.")
@click.option("--dry-run", is_flag=True, help="Check everything, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def package(
    engines: Path,
    repo: Path,
    sku: str | None,
    checkpoint: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Write a Triton model repository for an engine set.

    REPO refers to the engines and the checkpoint by path; neither is copied.
    """
    from twotower_contract.atomic import Writing
    from twotower_contract.engine_set import open_engine_set
    from twotower_engines.serving.package import package as write
    from twotower_engines.serving.repository import MODELS
    from twotower_engines.serving.settings import Settings

    opened = open_engine_set(engines, sku)
    settings = Settings(
        engine_set=opened.folder.resolve(),
        checkpoint=checkpoint.resolve() if checkpoint is not None else None,
        **rest,
    )
    write(opened, repo, settings, Writing(force, dry_run))
    if as_json:
        described = {"repository": str(repo.resolve()), "models": MODELS, **settings.parameters()}
        print(json.dumps(described))
    else:
        print(f"{repo}: {', '.join(MODELS)}, serving {opened.folder}")
        _say_if_a_chunk_is_long(opened, settings.prefill_ms)
        print(f"next: twotower serve {repo}", file=sys.stderr)


def _say_if_a_chunk_is_long(engines: EngineSet, prefill_ms: float) -> None:
    from twotower_engines.generation.costs import costs_of_engines
    from twotower_engines.generation.turns import chunk_tokens

    costs, limits = costs_of_engines(engines), engines.build.limits
    chunk = chunk_tokens(costs, limits)
    milliseconds = 1e3 * costs.extend(1, chunk)
    if milliseconds > prefill_ms:
        print(
            f"note: a chunk of a prompt has {chunk} tokens and takes about {milliseconds:.3g} ms, "
            f"more than --prefill-ms {prefill_ms:g}; `twotower build --chunk` makes chunks shorter",
            file=sys.stderr,
        )


@click.command(epilog=SERVE_EPILOG)
@click.argument("repo", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--grpc-port", type=int, default=8001, help="Port of gRPC; 0 takes a free one.")
@click.option("--metrics-port", type=int, default=8002, help="Port of metrics; 0 takes a free one.")
@click.option(
    "--http-port", type=int, help="Speak HTTP on this port, too; 0 takes a free one.  [no HTTP]"
)
@click.option(
    "--openai", is_flag=True, help=f"Speak OpenAI's interface on port {OPENAI_PORT}, too."
)
@click.option("--openai-port", type=int, help="The same on another port; 0 takes a free one.")
@click.option("--no-metrics", is_flag=True, help="Serve no metrics.")
@click.option("--tls-certificate", type=FILE, help="Encrypt gRPC with this certificate (PEM).")
@click.option("--tls-key", type=FILE, help="Key of the certificate (PEM).")
@click.option(
    "--tls-clients",
    type=FILE,
    help="Ask clients for a certificate that this authority signed (PEM), as it must the server's.",
)
@click.option(
    "--key-file", type=FILE, help="Answer those alone who send the key that this file holds."
)
@click.option("--log", type=click.Path(path_type=Path), help="Append the server's log here.")
@click.option("--log-json", is_flag=True, help="Log each request as a JSON object on a line.")
@click.option(
    "--traces",
    metavar="URL",
    help="Send a trace of each request to this collector of OpenTelemetry (OTLP over HTTP), for "
    "example http://localhost:4318/v1/traces.",
)
@click.option(
    "--ready-timeout",
    type=click.FloatRange(min=0),
    default=600,
    help="Seconds that the models may take to load.",
)
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0.5),
    default=3,
    help="Seconds without an answer after which a model is taken for hung and started again.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    help="Seconds that open requests have to end after SIGTERM.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the ready line as a JSON object.")
def serve(
    repo: Path,
    metrics_port: int,
    openai: bool,
    openai_port: int | None,
    no_metrics: bool,
    tls_certificate: Path | None,
    tls_key: Path | None,
    tls_clients: Path | None,
    key_file: Path | None,
    ready_timeout: float,
    stall_timeout: float,
    grace: float,
    as_json: bool,
    **rest: Any,
) -> None:
    """Run a Triton server on a model repository until it is told to end.

    The server is the `tritonserver` on PATH, or else the one inside the package nvidia-pytriton.
    """
    from twotower_engines.serving.launch import ServerOptions, read_key, tls_of
    from twotower_engines.serving.supervisor import Policy, Supervisor

    if openai and openai_port is None:
        openai_port = OPENAI_PORT
    options = ServerOptions(
        metrics_port=None if no_metrics else metrics_port,
        openai_port=openai_port,
        tls=tls_of(tls_certificate, tls_key, tls_clients),
        access_key=read_key(key_file) if key_file is not None else None,
        **rest,
    )
    show = _Status()
    supervisor = Supervisor(repo, options, Policy(ready_timeout, stall_timeout, grace), _tell)

    def ready(server: TritonServer, seconds: float) -> None:
        show.clear()
        fronts = {kind: front.address for kind, front in supervisor.fronts.items()}
        print(_ready(server, fronts, seconds, as_json), flush=True)

    def end(number: int, frame: object) -> None:
        print("ending the server", file=sys.stderr)
        supervisor.end(number)

    with told_to_end(end):
        try:
            supervisor.run(show, ready)
        finally:
            show.clear()


def _tell(event: str) -> None:
    print(f"twotower serve: {event}", file=sys.stderr, flush=True)


class _Status:
    """A line on how the server starts; in a log, without the seconds, which would fill it."""

    def __init__(self) -> None:
        self._line = StatusLine(log_seconds=0.0)
        self._said = ""

    def __call__(self, text: str) -> None:
        what = text if sys.stderr.isatty() else text.partition(" (")[0]
        if what != self._said:
            self._said = what
            self._line.draw(what)

    def clear(self) -> None:
        """Remove the line."""
        self._line.clear()


def _ready(server: TritonServer, fronts: dict[str, str], seconds: float, as_json: bool) -> str:
    values: dict[str, object] = {
        "grpc": server.grpc_address,
        "http": fronts.get("http"),
        "openai": fronts.get("openai"),
        "metrics": server.metrics_address,
        "pid": server.pid,
        "seconds": round(seconds, 2),
    }
    if as_json:
        return json.dumps({"event": "ready", **values})
    given = " ".join(f"{key}={value}" for key, value in values.items() if value is not None)
    return f"ready {given}"
