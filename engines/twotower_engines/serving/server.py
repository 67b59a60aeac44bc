"""A Triton server process: started, waited for, and gone when we are.

```python
with TritonServer(Path("repository"), ServerOptions(grpc_port=0)) as server:
    server.wait_until_ready()
    print(server.grpc_address)
```
The server runs in a session of its own, so that Ctrl-C reaches us alone and is passed on once. It
ends with us in every case and in a bounded time: on a signal, at the end of the `with` block, and
even when we are killed (see `lifeline`).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from twotower_engines.errors import ServingError
from twotower_engines.serving.installation import find_server, make_backends, problem_of
from twotower_engines.serving.lifeline import VARIABLE, remove_left, start_keeper
from twotower_engines.serving.place import link_models, make_folder, refusal
from twotower_engines.serving.ports import choose_ports, hold_ports
from twotower_engines.serving.repository import MODELS, check_repository
from twotower_engines.serving.stubs import dead_stubs, library_path

EXIT_SECONDS = 10  # how long the server may take to unload its models
KILL_SECONDS = EXIT_SECONDS + 2  # after which it is killed
GONE_SECONDS = 2  # in which a killed process is gone, on a busy machine
HEED_SECONDS = 2  # in which the server heeds a process of a model that ended, where it does at all


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to run the server.

    Attributes:
        host: Address to listen on.
        grpc_port: 0 for any free one, as for the others.
        http_port: None for no HTTP.
        metrics_port: None for no metrics.
        log: File for the server's log; None for a temporary file.
    """

    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int | None = 8000
    metrics_port: int | None = 8002
    log: Path | None = None


class TritonServer:
    """A running server.

    Args:
        repository: The model repository.
        options: Ports and log.
        models: Models that must be ready.

    Raises:
        ServingError: The folder is no model repository, no server is installed, it cannot run our
            models, a port is taken, or the log cannot be written.
    """

    def __init__(
        self,
        repository: Path,
        options: ServerOptions | None = None,
        models: tuple[str, ...] = MODELS,
    ) -> None:
        self._options = options or ServerOptions()
        self._repository, self._models = repository.absolute(), models
        check_repository(self._repository, models)
        self._installation = find_server()
        problem = problem_of(self._installation, importlib.metadata.version("numpy"))
        problem = problem or refusal()
        if problem is not None:
            raise ServingError(problem)
        self._ports = choose_ports(self._options.host, self._wanted_ports())
        self._started = time.monotonic()
        # Two servers with one prefix would read each other's shared memory.
        self._prefix = f"twotower_{os.getpid()}_{secrets.token_hex(4)}_"
        self._held: list[socket.socket] = []
        self._folder = make_folder()
        # Whoever holds the reading end learns when we are gone: see `lifeline`.
        listening, self._lifeline = os.pipe()
        try:
            self._held = hold_ports(self._options.host, self._ports)
            self._links = link_models(self._repository, models, self._folder)
            self._log = self._options.log or self._folder / "server.log"
            self._process, self._keeper = self._start(listening)
        except BaseException:
            self._cut()
            self._let_go()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            os.close(listening)

    @property
    def source(self) -> str:
        """Origin of the server binary, for people."""
        return self._installation.source

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def grpc_address(self) -> str:
        """`host:port` of gRPC."""
        return self._address("--grpc-port")

    @property
    def http_address(self) -> str | None:
        """`host:port` of HTTP, or None."""
        return self._address("--http-port") if "--http-port" in self._ports else None

    @property
    def metrics_address(self) -> str | None:
        """`host:port` of the metrics, or None."""
        return self._address("--metrics-port") if "--metrics-port" in self._ports else None

    def wait_until_ready(
        self, timeout: float = 600.0, progress: Callable[[str], None] | None = None
    ) -> float:
        """Wait until every model is ready.

        Args:
            timeout: In seconds.
            progress: Called a few times a second with the event that is awaited.

        Returns:
            Seconds since the start.

        Raises:
            ServingError: The server or the process of a model ended, or was not ready in time.
                Carries the end of the server's log.
        """
        from tritonclient.grpc import InferenceServerClient

        next_look = float(HEED_SECONDS)
        # It is our own, so no proxy of the environment stands between.
        direct = [("grpc.enable_http_proxy", 0)]
        with InferenceServerClient(_dialled(self.grpc_address), channel_args=direct) as client:
            while True:
                elapsed = time.monotonic() - self._started
                code = self._process.poll()
                if code is not None:
                    raise ServingError(f"the Triton server {_ending(code)}\n{self.log_tail()}")
                waiting = [name for name in self._models if not _is_ready(client, name)]
                if not waiting:
                    return elapsed
                if elapsed > next_look:
                    self._check_models()
                    next_look = elapsed + HEED_SECONDS
                if elapsed > timeout:
                    raise ServingError(
                        f"not ready after {timeout:.0f} s: {', '.join(waiting)}; "
                        f"give more time with --ready-timeout\n{self.log_tail()}"
                    )
                if progress is not None:
                    progress(f"loading {', '.join(waiting)} ({elapsed:.0f} s)")
                time.sleep(0.1)

    def _check_models(self) -> None:
        """Refuse to wait for a model whose process has ended: the server would wait for ever."""
        before = dead_stubs(self.pid)
        time.sleep(0.5)  # one that the server is about to heed is gone by then
        if set(before) & set(dead_stubs(self.pid)):
            raise ServingError(
                "the process of a model ended before it was ready, and the server does not heed "
                f"it; `twotower doctor` tests what such a process needs\n{self.log_tail()}"
            )

    def wait(self) -> int:
        """Wait until the server ends by itself, and return its exit code."""
        return self._process.wait()

    def request_stop(self) -> None:
        """Tell open requests and the server to end, and return at once.

        The server is gone after `KILL_SECONDS` at most, whatever its clients do.
        """
        self._cut()

    def kill(self) -> None:
        """End the server and everything that it started at once."""
        # The stubs of Python models are in the same process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the server and everything that it started, and remove what it left."""
        self.request_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILL_SECONDS)
        self.kill()
        self._process.wait()
        self._wait_for_models()
        self._keeper.kill()
        self._keeper.wait()
        remove_left(self._prefix, self._folder)
        self._let_go()

    def _wait_for_models(self) -> None:
        """Wait, seconds at most, until the kernel has let go of the group's killed processes."""
        end = time.monotonic() + GONE_SECONDS
        while time.monotonic() < end:
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.01)

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of the server's log, without the noise of a machine that has no GPU."""
        try:
            text = self._log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        text = text.replace(str(self._links), str(self._repository))
        kept = [line for line in text.splitlines() if line and not NOISE.search(line)]
        # A model's own error is worth more than the table and the messages of unloading after it.
        first = next((number for number, line in enumerate(kept) if ERROR.match(line)), None)
        kept = kept[-lines:] if first is None else kept[first : first + lines]
        return "\n".join(["the server's log says:", *(f"  {line}" for line in kept)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _cut(self) -> None:
        """Cut the lifeline; a second time does nothing."""
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)

    def _let_go(self) -> None:
        """Let other servers of ours have the ports."""
        for one in self._held:
            one.close()

    def _wanted_ports(self) -> dict[str, int]:
        wanted = {
            "--grpc-port": self._options.grpc_port,
            "--http-port": self._options.http_port,
            "--metrics-port": self._options.metrics_port,
        }
        return {option: port for option, port in wanted.items() if port is not None}

    def _address(self, option: str) -> str:
        host = self._options.host
        return f"[{host}]:{self._ports[option]}" if ":" in host else f"{host}:{self._ports[option]}"

    def _arguments(self) -> list[str]:
        host = self._options.host
        arguments = [
            f"--model-repository={self._links}",
            f"--exit-timeout-secs={EXIT_SECONDS}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            "--backend-config=python,shm-default-byte-size=4194304",
            f"--grpc-address={host}",
            f"--grpc-port={self._ports['--grpc-port']}",
            # Our clients ask a silent server every 30 s whether it is there. By default (5 minutes)
            # the third such question ends the connection.
            "--grpc-http2-min-recv-ping-interval-without-data=10000",
        ]
        backends = make_backends(self._installation, self._links.parent)
        if backends is not None:
            arguments.append(f"--backend-directory={backends}")
        for name in ("http", "metrics"):
            if f"--{name}-port" in self._ports:
                arguments.append(f"--{name}-port={self._ports[f'--{name}-port']}")
                arguments.append(f"--{name}-address={host}")
            else:  # port 0 would not mean none, but a random one
                arguments.append(f"--allow-{name}=false")
        return arguments

    def _open_log(self) -> BinaryIO:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            return self._log.open("wb")
        except OSError as problem:
            raise ServingError(
                f"{self._log}: the log cannot be written ({problem.strerror}); name another file "
                "with --log"
            ) from problem

    def _start(self, lifeline: int) -> tuple[subprocess.Popen[bytes], subprocess.Popen[bytes]]:
        """Start the server and its keeper."""
        environment = {**os.environ, VARIABLE: str(lifeline)}
        environment |= library_path(self._folder)
        # The stub embeds Python and finds packages through the first interpreter on PATH.
        scripts = str(Path(sys.executable).parent)
        environment["PATH"] = f"{scripts}{os.pathsep}{environment.get('PATH', '')}"
        command = [str(self._installation.binary), *self._arguments()]
        with self._open_log() as log:
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=(lifeline,),  # the models' processes inherit it from the server
            )
        try:
            keeper = start_keeper(lifeline, server.pid, KILL_SECONDS, self._prefix, self._folder)
        except BaseException:
            server.kill()
            server.wait()
            raise
        return server, keeper


NOISE = re.compile(r"pinned memory|CUDA driver|CudaDriver|NVML|DCGM|cudaError", re.IGNORECASE)
ERROR = re.compile(r"E\d{4} |error:|Traceback|terminate called|.*cannot open shared object")


def _is_ready(client: object, model: str) -> bool:
    from tritonclient.utils import InferenceServerException

    try:
        return bool(client.is_model_ready(model, client_timeout=2))  # type: ignore[attr-defined]
    except InferenceServerException:
        return False  # it does not listen yet


def _dialled(address: str) -> str:
    """Return an address that one can connect to: 0.0.0.0 and [::] only mean every interface."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before it was ready"
    return f"was ended by signal {signal.Signals(-code).name} before it was ready"
