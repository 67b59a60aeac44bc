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
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from twotower_engines.errors import ServingError
from twotower_engines.serving import restarts
from twotower_engines.serving.asking import ACCESS, CONTROL, Asker
from twotower_engines.serving.front import MODULES
from twotower_engines.serving.installation import find_server, make_backends, problem_of
from twotower_engines.serving.launch import LOG_JSON, TRACES, ServerOptions, Tls, arguments, name_of
from twotower_engines.serving.lifeline import (
    DRAIN,
    LIFELINE,
    SECONDS_TO_TELL,
    remove_left,
    start_keeper,
)
from twotower_engines.serving.log import end_of_log
from twotower_engines.serving.place import copy_models, make_folder, refusal
from twotower_engines.serving.ports import choose_ports, hold_ports
from twotower_engines.serving.repository import MODELS, check_repository
from twotower_engines.serving.stubs import (
    dead_stubs,
    group_lives,
    library_path,
    model_processes,
)

GONE_SECONDS = 2  # in which a killed process is gone, on a busy machine
HEED_SECONDS = 2  # in which the server heeds a process of a model that ended, where it does at all

Process = subprocess.Popen[bytes]


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
        self._options.check()
        check_repository(self._repository, models)
        self._installation = find_server()
        problem = problem_of(self._installation, importlib.metadata.version("numpy"))
        problem = problem or refusal()
        if problem is not None:
            raise ServingError(problem)
        given = self._options
        self._ports = choose_ports(given.host, given.wanted_ports(), given.fronts)
        self._started = time.monotonic()
        # Two servers with one prefix would read each other's shared memory.
        self._prefix = f"twotower_{os.getpid()}_{secrets.token_hex(4)}_"
        self._control_key = secrets.token_hex(16)
        self._held: list[socket.socket] = []
        self._folder = make_folder()
        # Whoever holds a reading end learns when we are gone: see `lifeline`.
        self._writing, reading = {}, {}
        for pipe in (DRAIN, LIFELINE):
            reading[pipe], self._writing[pipe] = os.pipe()
        try:
            self._held = hold_ports(self._options.host, self._ports)
            self._copies = copy_models(self._repository, models, self._folder)
            self._log = self._options.log or self._folder / "server.log"
            self._process, self._keeper = self._start(reading)
        except BaseException:
            self._cut(*self._writing)
            self._let_go()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        finally:
            for descriptor in reading.values():
                os.close(descriptor)

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
    def front_ports(self) -> dict[str, int]:
        """Ports of the processes beside the server, by their kind."""
        names = {kind: f"--{kind}-port" for kind in MODULES}
        return {kind: self._ports[name] for kind, name in names.items() if name in self._ports}

    @property
    def dialled(self) -> str:
        """`host:port` at which this machine reaches gRPC."""
        return _dialled(self.grpc_address)

    @property
    def metrics_address(self) -> str | None:
        """`host:port` of the metrics, or None."""
        return self._address("--metrics-port") if "--metrics-port" in self._ports else None

    @property
    def exit_code(self) -> int | None:
        """Exit code of the server, or None while it runs."""
        return self._process.poll()

    @property
    def parts(self) -> tuple[str, ...]:
        """Models that can be loaded again while requests to `twotower` are open."""
        return ("preprocessing", "postprocessing", "llm")

    @property
    def model_processes(self) -> dict[str, int]:
        """Process ids of the models that have one, as they were when the server was ready."""
        return self._model_processes

    @property
    def options_again(self) -> ServerOptions:
        """Options with which another server takes the place of this one."""
        ports: dict[str, Any] = {
            option.strip("-").replace("-", "_"): port for option, port in self._ports.items()
        }
        return replace(self._options, **ports)

    @contextlib.contextmanager
    def asker(self) -> Iterator[Asker]:
        """Give a connection that may use all that the server can do."""
        keys = {CONTROL: self._control_key}
        if self._options.access_key is not None:
            keys[ACCESS] = self._options.access_key
        tls = self._options.tls
        credentials, name = _credentials(tls) if tls is not None else (None, None)
        asker = Asker(self.dialled, credentials, name, keys)
        try:
            yield asker
        finally:
            asker.close()

    def reload(self, model: str) -> None:
        """Load a model again whose process has ended.

        Raises:
            NoAnswerError: The server could not.
        """
        with self.asker() as asker:
            asker.reload(model)
            asker.load("ensemble")  # which was unloaded with it
        self._model_processes |= model_processes(self.pid)

    def count_restart(self, part: str) -> None:
        """Let the metrics know that a part was started again."""
        self._options.restarts[part] += 1
        restarts.write(self._folder, self._options.restarts)

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
        next_look = float(HEED_SECONDS)
        with self.asker() as asker:
            while True:
                elapsed = time.monotonic() - self._started
                code = self._process.poll()
                if code is not None:
                    raise ServingError(f"the Triton server {_ending(code)}\n{self.log_tail()}")
                waiting = [name for name in self._models if not asker.is_ready(name)]
                if not waiting:
                    self._model_processes = model_processes(self.pid)
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
        """Tell open requests that the server ends, and return; it is gone a second later."""
        self._cut(DRAIN, LIFELINE)

    def drain(self) -> None:
        """Let the model refuse new requests and finish those that are open."""
        self._cut(DRAIN)

    def kill(self) -> None:
        """End the server and everything that it started at once."""
        # The stubs of Python models are in the same process group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the server and everything that it started, and remove what it left."""
        self.request_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SECONDS_TO_TELL + GONE_SECONDS)
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
        while group_lives(self._process.pid) and time.monotonic() < end:
            time.sleep(0.01)

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of the server's log, without noise; why a model failed comes last."""
        if not self._log.is_file():  # to read a pipe would take its lines, and wait for more
            return f"{self._log} has its log"
        try:
            with self._log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read().decode(errors="replace")
        except OSError:
            return ""
        return end_of_log(text.replace(str(self._copies), str(self._repository)), lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _cut(self, *pipes: str) -> None:
        """Cut pipes; a second time does nothing."""
        for pipe in pipes:
            descriptor = self._writing.pop(pipe, None)
            if descriptor is not None:
                os.close(descriptor)

    def _let_go(self) -> None:
        """Let other servers of ours have the ports."""
        for one in self._held:
            one.close()

    def _address(self, option: str) -> str:
        host = self._options.host
        return f"[{host}]:{self._ports[option]}" if ":" in host else f"{host}:{self._ports[option]}"

    def _arguments(self) -> list[str]:
        words = arguments(self._options, self._ports, self._models, self._control_key)
        words.append(f"--model-repository={self._copies}")
        words.append(f"--backend-config=python,shm-region-prefix-name={self._prefix}")
        backends = make_backends(self._installation, self._copies.parent)
        return words if backends is None else [*words, f"--backend-directory={backends}"]

    def _open_log(self) -> BinaryIO:
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            # Why the last server ended stands there, and standard error may have other writers.
            log = self._log.open("ab")
        except OSError as problem:
            raise ServingError(
                f"{self._log}: the log cannot be written ({problem.strerror}); name another file "
                "with --log"
            ) from problem
        self._log_start = self._log.stat().st_size
        return log

    def _start(self, reading: dict[str, int]) -> tuple[Process, Process]:
        """Start the server and its keeper."""
        environment = {**os.environ, **{pipe: str(one) for pipe, one in reading.items()}}
        environment |= library_path(self._folder)
        environment[restarts.FILE] = restarts.write(self._folder, self._options.restarts)
        environment[LOG_JSON] = "1" if self._options.log_json else ""
        environment[TRACES] = self._options.traces or ""
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
                pass_fds=tuple(reading.values()),  # which the models' processes inherit
            )
        try:
            keeper = start_keeper(reading[LIFELINE], server.pid, self._prefix, self._folder)
        except BaseException:
            server.kill()
            server.wait()
            raise
        return server, keeper


def _credentials(tls: Tls) -> tuple[Any, str | None]:
    """Return the credentials with which to ask our own server, and the name in its certificate."""
    import grpc

    certificate = tls.certificate.read_bytes()
    # Its authority may not be on this machine: the certificate itself is trusted.
    ours = (tls.key.read_bytes(), certificate) if tls.clients is not None else (None, None)
    return grpc.ssl_channel_credentials(certificate, *ours), name_of(tls.certificate)


def _dialled(address: str) -> str:
    """Return an address that one can connect to: 0.0.0.0 and [::] only mean every interface."""
    return address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} before it was ready"
    return f"was ended by signal {signal.Signals(-code).name} before it was ready"
