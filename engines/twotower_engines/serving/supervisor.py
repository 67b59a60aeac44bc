"""Keep a server alive: notice that it died or hangs, and bring it back; end it in peace.

A process that ended is seen at once, one that was stopped within a second, and one that hangs when
it has owed an answer for `stall_seconds` (see `asking`). Where the engine's process is at fault,
the server is started anew: a load alone would leave open requests without a word (server 2.51),
while with the server their connections end. The steps of the ensemble are loaded again one by one.
A question may wait in these behind many requests: as long as each answers some, none hangs.

Time is counted in our own steps: when the whole machine stood still, nobody hung.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from twotower_engines.errors import ServingError
from twotower_engines.serving.asking import NoAnswerError
from twotower_engines.serving.front import Front
from twotower_engines.serving.launch import ServerOptions
from twotower_engines.serving.repository import CONFIG_FILE, read_config
from twotower_engines.serving.server import TritonServer
from twotower_engines.serving.stubs import ENDED, has_ended, state_of

STEP_SECONDS = 0.1
ASK_SECONDS = 0.5  # between an answer and the next question
STOPPED_SECONDS = 1.0
WELL_SECONDS = 60.0  # after which a start counts as a success
LONGEST_PAUSE_SECONDS = 30.0  # between two starts
FAILURES_IN_A_ROW = 6  # starts that failed before we give up
BUSY_LOOKS = 40  # in a row at which only the first step has answered, which take 20 s
STEPS = ("preprocessing", "postprocessing")  # of the ensemble, beside the engine

Tell = Callable[[str], None]


class EndingError(Exception):
    """Somebody asked for the end while the server was starting."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How to look after a server.

    Attributes:
        ready_seconds: How long the models may take to load.
        stall_seconds: How long a model may owe an answer.
        grace_seconds: How long open requests may take to end after SIGTERM.
    """

    ready_seconds: float = 600.0
    stall_seconds: float = 3.0
    grace_seconds: float = 30.0


class Supervisor:
    """Runs a server until it is told to end.

    Args:
        repository: The model repository.
        options: Ports, log and access of the server.
        policy: How to look after it.
        tell: Receives each event that an operator should know.
    """

    def __init__(
        self, repository: Path, options: ServerOptions, policy: Policy, tell: Tell
    ) -> None:
        self._repository, self._options = repository, options
        self._policy, self._tell = policy, tell
        self.fronts: dict[str, Front] = {}
        self._server: TritonServer | None = None
        self._ending: signal.Signals | None = None

    def end(self, number: int) -> None:
        """End the server: after SIGTERM open requests first; the second time at once.

        For a signal's handler: it only leaves word.
        """
        if self._ending is None:
            self._ending = signal.Signals(number)
        elif self._server is not None:
            self._server.kill()

    def run(self, starting: Tell, ready: Callable[[TritonServer, float], None]) -> None:
        """Run the server.

        Args:
            starting: Receives what is awaited, a few times a second.
            ready: Called with the server and the seconds that it took, at each start.

        Raises:
            ServingError: It did not start, or too often not again.
        """
        try:
            self._run(starting, ready)
        finally:
            for front in self.fronts.values():
                front.close()

    def _run(self, starting: Tell, ready: Callable[[TritonServer, float], None]) -> None:
        options, failures, began, has_run = self._options, 0, time.monotonic(), False
        while True:
            try:
                with TritonServer(self._repository, options) as self._server:
                    server = self._server
                    options = server.options_again
                    began = time.monotonic()
                    seconds = server.wait_until_ready(
                        self._policy.ready_seconds, lambda text: self._start(starting, text)
                    )
                    has_run = True
                    self._open_fronts(server)
                    ready(server, seconds)
                    problem = self._watch(server)
                    if problem is None:
                        self._drain(server)
                        return
                    self._tell(f"{problem}; the server is started again")
                    server.kill()
            except EndingError:
                return
            except ServingError as error:
                if self._ending is not None:
                    return
                failures += 1
                # Server 2.51 aborts now and then while it starts (boost's lock_exception).
                aborted = self._server is not None and self._server.exit_code == -signal.SIGABRT
                if failures >= (FAILURES_IN_A_ROW if has_run else 1 + aborted):
                    raise
                self._tell(f"the server did not start, and is started again: {error}")
            finally:
                self._server = None
            if has_run and time.monotonic() - began > WELL_SECONDS:
                failures = 0
            options.restarts["server"] += 1
            options = replace(options, fronts=tuple(f"--{kind}-port" for kind in self.fronts))
            self._pause(min(2.0**failures - 1, LONGEST_PAUSE_SECONDS))

    def _open_fronts(self, server: TritonServer) -> None:
        """Start the processes beside the server that are not there yet."""
        for kind, port in server.front_ports.items():
            if kind not in self.fronts:
                config = read_config(self._repository / "twotower" / CONFIG_FILE)
                engines = Path(config.parameters["engine_set"].string_value)
                self.fronts[kind] = Front(kind, self._options, port, server.dialled, engines)

    def _start(self, starting: Tell, text: str) -> None:
        if self._ending is not None:
            raise EndingError
        starting(text)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._ending is None and time.monotonic() < end:
            time.sleep(STEP_SECONDS)

    def _watch(self, server: TritonServer) -> str | None:
        """Look after a server; return why it must be started anew, or None to end it."""
        steps = dict.fromkeys(("twotower", "ensemble"), 0)
        stopped = dict.fromkeys(server.model_processes, 0)
        # Beside us: a load waits for open requests, for ever where the engine dies meanwhile.
        healer, healing = ThreadPoolExecutor(1), Future[str | None]()
        healing.set_result(None)
        with _Asking(server, steps, self._policy.stall_seconds):
            while self._ending is None:
                time.sleep(STEP_SECONDS)
                if (code := server.exit_code) is not None:
                    return f"the Triton server ended with exit code {code}"
                for kind, front in self.fronts.items():
                    if (event := front.look_after()) is not None:
                        server.count_restart(kind)
                        self._tell(f"{event}; it was started again")
                for door in steps:
                    steps[door] += 1
                sick = self._sick(server, stopped, steps)
                engine = next(
                    (why for model, why in sick.items() if model not in server.parts), None
                )
                if engine is not None:
                    return engine
                if not healing.done():
                    continue
                if (problem := healing.result()) is not None:
                    return problem
                if sick:
                    healing = healer.submit(self._heal, server, sick, steps)
        return None

    def _sick(
        self, server: TritonServer, stopped: dict[str, int], steps: dict[str, int]
    ) -> dict[str, str]:
        """Return the models that ended or hang, and what is wrong with each.

        Args:
            stopped: For how many steps the process of each model was stopped; brought up to date.
            steps: For how many steps each door owes an answer.
        """
        sick = {}
        for model, process in dict(server.model_processes).items():
            state = state_of(process)
            stopped[model] = stopped[model] + 1 if state == "T" else 0
            if state in ENDED:
                sick[model] = f"the process of {model} has ended"
            elif stopped[model] * STEP_SECONDS > STOPPED_SECONDS:
                sick[model] = f"the process of {model} is stopped"
        limit = self._policy.stall_seconds / STEP_SECONDS
        silent = f"has given no answer for {self._policy.stall_seconds:g} s"
        if steps["twotower"] > limit:
            sick.setdefault("twotower", f"twotower {silent}")
        elif not sick and steps["ensemble"] > limit:
            sick = dict.fromkeys(STEPS, f"the ensemble {silent}")
        return sick

    def _heal(
        self, server: TritonServer, sick: dict[str, str], steps: dict[str, int]
    ) -> str | None:
        """Load parts of the ensemble again; return why that will not do, or None."""
        for model, problem in sick.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(server.model_processes[model], signal.SIGKILL)
            try:
                server.reload(model)
            except NoAnswerError as error:
                return f"{problem}, and {error}"
            server.count_restart(model)
            self._tell(f"{problem}; it was loaded again")
        steps["ensemble"] = 0
        return None

    def _drain(self, server: TritonServer) -> None:
        """Let open requests end, within the grace that there is."""
        if self._ending is signal.SIGINT or not self._policy.grace_seconds:
            return
        server.drain()
        engine = server.model_processes["twotower"]
        end = time.monotonic() + self._policy.grace_seconds
        with server.asker() as asker:
            while (left := end - time.monotonic()) > 0 and server.exit_code is None:
                # An engine that is silent may stand still with its machine; one that has ended
                # tells nobody.
                if has_ended(engine):
                    return
                with contextlib.suppress(NoAnswerError):
                    state = asker.probe("twotower", min(self._policy.stall_seconds, left))
                    if state["draining"] and not state["running"] + state["waiting"]:
                        server.kill()  # in peace it would answer with errors for seconds
                        return
                time.sleep(STEP_SECONDS)


class _Asking:
    """While active, asks each door for an answer again and again, and clears its count of steps."""

    def __init__(self, server: TritonServer, steps: dict[str, int], seconds: float) -> None:
        self._server, self._steps, self._seconds = server, steps, seconds
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(door,), daemon=True) for door in steps
        ]
        self._threads.append(threading.Thread(target=self._see_progress, daemon=True))

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _ask(self, door: str) -> None:
        with self._server.asker() as asker:
            while not self._stop.wait(ASK_SECONDS):
                with contextlib.suppress(NoAnswerError):
                    asker.probe(door, self._seconds)
                    self._steps[door] = 0

    def _see_progress(self) -> None:
        """Clear the count of the ensemble when its steps have answered something since.

        For a while the first one's word is enough: the second has nothing to do where requests are
        refused, but may hang as well.
        """
        before: list[int] = []
        left = BUSY_LOOKS
        with self._server.asker() as asker:
            while not self._stop.wait(ASK_SECONDS):
                with contextlib.suppress(NoAnswerError):
                    now = [asker.answered(step) for step in STEPS]
                    first, second = map(int.__ne__, now, before or now)
                    if second:
                        left = BUSY_LOOKS
                    if first and left:
                        self._steps["ensemble"], left = 0, left - 1
                        before = now
                    before = before or now
