"""Spans of a model process: the same model, which also notes where its time goes.

`benchmarks.serving` writes a model.py that takes its model from here. A file that appears beside
`SPANS` asks for the sums so far; they are written to `SPANS`.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.serving.loop import EngineLoop
from twotower_engines.serving.twotower import TritonPythonModel

__all__ = ["TritonPythonModel"]

SPANS = "TWOTOWER_BENCHMARK_SPANS"
POLL_SECONDS = 0.05

_sums: defaultdict[str, float] = defaultdict(float)


def _timed(owner: type, method: str, name: str) -> None:
    """Note wall and CPU time of a method, which only the engine's thread calls."""
    inner: Callable[..., Any] = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return inner(*arguments)
        finally:
            _sums[f"{name} wall"] += time.perf_counter() - wall
            _sums[f"{name} cpu"] += time.thread_time() - cpu
            _sums[f"{name} count"] += 1
            if name == "denoise":
                _sums["rows"] += len(arguments[1])

    setattr(owner, method, timed)


def _threads() -> dict[str, float]:
    """Return the CPU time of each thread, and how long it was ready but no core was free."""
    known = {one.native_id: one.name for one in threading.enumerate()}
    sums: defaultdict[str, float] = defaultdict(float)
    for task in Path("/proc/self/task").iterdir():
        name = known.get(int(task.name), "others")
        cpu, waited, _ = map(int, (task / "schedstat").read_text().split())
        sums[f"{name} thread cpu"] += cpu / 1e9
        sums[f"{name} thread waited"] += waited / 1e9
    return dict(sums)


def _answer() -> None:
    path = Path(os.environ[SPANS])
    asked = path.with_suffix(".ask")
    while True:
        time.sleep(POLL_SECONDS)
        if asked.exists():
            asked.unlink()
            part = path.with_suffix(".part")
            part.write_text(json.dumps({**_sums, **_threads()}), encoding="utf-8")
            part.replace(path)


if SPANS in os.environ:  # else it was imported for the name alone, where engines run untimed
    for _owner, _method, _name in (
        (OnnxRuntime, "extend", "extend"),
        (OnnxRuntime, "denoise", "denoise"),
        (Scheduler, "turn", "turn"),
        (EngineLoop, "_take_in", "take in"),
    ):
        _timed(_owner, _method, _name)
    threading.Thread(target=_answer, name="spans", daemon=True).start()
