"""The options of a server, and the command line of Triton that follows from them."""

from __future__ import annotations

import re
import ssl
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower_engines.errors import ServingError
from twotower_engines.serving.asking import ACCESS, CONTROL

# Variables by which the model `twotower` learns of them.
LOG_JSON = "TWOTOWER_LOG_JSON"
TRACES = "TWOTOWER_TRACES"

# What nobody but `serve` may use: with them a caller could register the memory of the models'
# processes, unload a model, or switch the log off.
CONTROLS = ("model-repository", "shared-memory", "trace", "logging")
# What a key opens where one is set. Health stays open: it tells nothing but that a server is there.
ACCESSES = ("inference", "metadata", "model-config", "statistics")


@dataclass(frozen=True, slots=True)
class Tls:
    """Encryption of the server's gRPC.

    Attributes:
        certificate: PEM file of the server's certificate, with those that lead to its authority.
        key: PEM file of its key.
        clients: PEM file of the authority that must have signed the clients' certificates; None
            where clients need none. The server's own must be from it then, as `serve` asks with it.
    """

    certificate: Path
    key: Path
    clients: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to run the server.

    Attributes:
        host: Address to listen on.
        grpc_port: 0 for any free one, as for the other.
        metrics_port: None for no metrics.
        http_port: None for no HTTP, which a process beside the server speaks.
        openai_port: The same for OpenAI's interface.
        log: File for the server's log; None for a temporary file.
        log_json: Whether each request is logged as a JSON object.
        restarts: How often `serve` started the server, and each part of it, again; counted on.
        fronts: Ports' options of the processes beside the server that listen already.
        tls: Encryption; None for none.
        access_key: Key that callers must send; None where everyone may ask.
        traces: URL to which a trace of each request goes (OTLP over HTTP); None for none.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 8001
    metrics_port: int | None = 8002
    http_port: int | None = None
    openai_port: int | None = None
    log: Path | None = None
    log_json: bool = False
    restarts: Counter[str] = field(default_factory=Counter)
    fronts: tuple[str, ...] = ()
    tls: Tls | None = None
    access_key: str | None = None
    traces: str | None = None

    def wanted_ports(self) -> dict[str, int]:
        """Return the ports by the name of their option."""
        wanted = {
            "--grpc-port": self.grpc_port,
            "--metrics-port": self.metrics_port,
            "--http-port": self.http_port,
            "--openai-port": self.openai_port,
        }
        return {option: port for option, port in wanted.items() if port is not None}

    def check(self) -> None:
        """Refuse options that no server could start with.

        Raises:
            ServingError: A file of TLS cannot be read, or the key or the collector is none.
        """
        files = [self.tls.certificate, self.tls.key, self.tls.clients] if self.tls else []
        for file in filter(None, files):
            _read(file)
        if self.traces is not None and not re.fullmatch(r"https?://[^\s/]\S*", self.traces):
            raise ServingError(
                f"--traces {self.traces}: is no address of a collector; give a URL of HTTP, for "
                "example http://localhost:4318/v1/traces"
            )
        key = self.access_key
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ServingError(
                "the access key (--key-file) is empty or has other characters than printable "
                "ASCII; a header of HTTP cannot carry it: give another"
            )


def arguments(
    options: ServerOptions, ports: dict[str, int], models: Sequence[str], control_key: str
) -> list[str]:
    """Return the arguments of `tritonserver`, without those that name folders.

    Args:
        options: How to run it.
        ports: Chosen ports, by the name of their option.
        models: Models to load.
        control_key: Key of what nobody but `serve` may use.
    """
    host = options.host
    words = [
        "--model-control-mode=explicit",
        *(f"--load-model={name}" for name in models),
        # Our configurations are complete; to ask a Python model would start its process twice.
        "--disable-auto-complete-config",
        "--backend-config=python,shm-default-byte-size=4194304",
        # A body of 200,000 brackets ends Triton's HTTP, and anyone could register shared memory.
        "--allow-http=false",
        f"--grpc-address={host}",
        f"--grpc-port={ports['--grpc-port']}",
        # Messages that are kept for the next request keep their size, too.
        "--grpc-infer-allocation-pool-size=0",
        # Our clients ask a silent server every 30 s whether it is there. By default (5 minutes)
        # the third such question ends the connection.
        "--grpc-http2-min-recv-ping-interval-without-data=10000",
        f"--grpc-restricted-protocol={','.join(CONTROLS)}:{CONTROL}={control_key}",
    ]
    if options.access_key is not None:
        allowed = f"{','.join(ACCESSES)}:{ACCESS}={options.access_key}"
        words.append(f"--grpc-restricted-protocol={allowed}")
    if options.tls is not None:
        words += [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={options.tls.certificate}",
            f"--grpc-server-key={options.tls.key}",
        ]
        if options.tls.clients is not None:
            words += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={options.tls.clients}"]
    if options.traces is not None:
        words += [
            "--trace-config=mode=opentelemetry",
            f"--trace-config=opentelemetry,url={options.traces}",
            "--trace-config=opentelemetry,resource=service.name=twotower",
            "--trace-config=level=TIMESTAMPS",
            "--trace-config=rate=1",
        ]
    if "--metrics-port" in ports:
        words.append(f"--metrics-port={ports['--metrics-port']}")
        words.append(f"--metrics-address={host}")
    else:  # port 0 would not mean none, but a random one
        words.append("--allow-metrics=false")
    return words


def tls_of(certificate: Path | None, key: Path | None, clients: Path | None) -> Tls | None:
    """Return the encryption that three options ask for.

    Raises:
        ServingError: One of them is missing.
    """
    if certificate is not None and key is not None:
        return Tls(certificate.absolute(), key.absolute(), clients and clients.absolute())
    if certificate is None and key is None and clients is None:
        return None
    raise ServingError("--tls-certificate and --tls-key belong together; give both")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as problem:
        raise ServingError(f"{file}: cannot be read ({problem.strerror})") from problem


def read_key(file: Path) -> str:
    """Read a key from a file, without the end of its line.

    Raises:
        ServingError: The file cannot be read.
    """
    return _read(file).decode(errors="replace").strip()


def name_of(certificate: Path) -> str | None:
    """Return a host name that a certificate is for; None where it names none."""
    # Python has no other decoder of certificates; a package for one name would be much.
    decode = getattr(ssl, "_ssl")._test_decode_cert  # noqa: B009
    try:
        fields: dict[str, Any] = decode(str(certificate))
    except (OSError, ValueError) as problem:
        raise ServingError(f"{certificate}: is no certificate in PEM form ({problem})") from problem
    names = [value for kind, value in fields.get("subjectAltName", ()) if kind == "DNS"]
    return next((name.replace("*", "any") for name in names), None)
