"""How a command is ended: SIGTERM is Ctrl-C, the exit code is 130, and nothing is left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.command import twotower
from tests.support.waiting import wait_until
from twotower_contract.processes import next_of

INTERRUPTED = 130
# Keeps a verb at its longest step, where only a signal ends it.
HELD = """
import sys, time
import {module} as module
def hold(*args, **kwargs):
    print("HELD", flush=True)
    while True:
        time.sleep(0.05)
module.{name} = hold
from twotower_client.cli import main
sys.argv = ["twotower", *sys.argv[1:]]
main()
"""
STEPS = {
    "export": ("twotower_export.bundle", "_write_graph", ["export", "{checkpoint}", "{out}/x"]),
    "tensorrt-llm": (
        "twotower_export.nemotron_h",
        "tokenizer_files",
        ["export", "{checkpoint}", "{out}/x", "--target", "tensorrt-llm"],
    ),
    "build": (
        "twotower_engines.building.build",
        "_write_set",
        ["build", "{bundle}", "{out}/x", "--sku", "cpu"],
    ),
    "tiny": ("shutil", "copyfile", ["tiny", "{out}/x", "--pretrained"]),
    "package": ("twotower_engines.serving.package", "_write", ["package", "{engines}", "{out}/x"]),
    "kernels": (
        "twotower_engines.kernels.compile",
        "compile_kernel",
        ["kernels", "--output", "{out}/x"],
    ),
    "golden": ("twotower_export.cli.golden", "compute_golden", ["golden", "{checkpoint}"]),
}


def arguments_of(step: str, path_folders: Path, out: Path) -> list[str]:
    places = {name: path_folders / name for name in ("checkpoint", "bundle", "engines")}
    return [word.format(**places, out=out) for word in STEPS[step][2]]


def start_held(step: str, path_folders: Path, out: Path) -> subprocess.Popen:
    """Start a verb and return it once it stands in the middle of its work."""
    module, name, _ = STEPS[step]
    code = HELD.format(module=module, name=name)
    arguments = arguments_of(step, path_folders, out)
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache")}
    running = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert running.stdout.readline() == "HELD\n", running.communicate()[1]
    return running


def left(out: Path) -> list[Path]:
    """What a command left, but for empty folders, the cache's locks, and ONNX Runtime's own."""
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "locks"]
    return [path for path in files if "Microsoft" not in path.parts]


@pytest.mark.parametrize(
    ("step", "number"),
    [
        *((step, signal.SIGTERM) for step in STEPS),  # one handler has all three signals
        ("export", signal.SIGINT),
        ("build", signal.SIGHUP),
    ],
)
def test_an_interrupted_verb_leaves_nothing(path_folders, tmp_path, step, number) -> None:
    running = start_held(step, path_folders, tmp_path)
    running.send_signal(number)
    _, said = running.communicate(timeout=30)
    assert running.returncode == INTERRUPTED, said
    assert said.endswith("interrupted\n")
    assert "Traceback" not in said
    assert left(tmp_path) == []
    assert not list(tmp_path.glob(".partial-*"))


@pytest.mark.parametrize("step", ["export", "tensorrt-llm", "build", "tiny", "package"])
def test_what_a_killed_verb_left_goes_with_the_next_run(path_folders, tmp_path, step) -> None:
    running = start_held(step, path_folders, tmp_path)
    running.kill()
    running.communicate(timeout=30)
    assert [path for path in tmp_path.rglob(".partial-*") if "cache" not in path.parts]
    words = arguments_of(step, path_folders, tmp_path)
    assert twotower(*words, XDG_CACHE_HOME=str(tmp_path / "cache")).returncode == 0
    assert not list(tmp_path.rglob(".partial-*"))


def test_children_are_ended_and_clean_up_first(tmp_path) -> None:
    """`docker stop` reaches the parent alone, and the parent must not kill its child at once."""
    mark, ready = tmp_path / "mark", tmp_path / "ready"
    mark.touch()
    child = (
        "import pathlib, time; from twotower_contract.processes import interruptible\n"
        "interruptible()\n"
        "try:\n"
        f"    pathlib.Path({str(ready)!r}).touch(); time.sleep(60)\n"
        f"finally:\n    time.sleep(0.5); pathlib.Path({str(mark)!r}).unlink()\n"
    )
    parent = (
        "import sys; from twotower_contract.processes import *\n"
        f"interruptible(); run_child([sys.executable, '-c', {child!r}])"
    )
    running = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.PIPE)
    wait_until(ready.exists)
    running.terminate()
    running.communicate(timeout=30)
    assert not mark.exists()


def test_what_is_ignored_stays_ignored() -> None:
    """`nohup` starts a command with SIGHUP ignored."""
    code = (
        "import signal; from twotower_contract.processes import interruptible\n"
        "interruptible(); print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    words = ["bash", "-c", 'trap "" HUP; exec "$@"', "x", sys.executable, "-c", code]
    assert subprocess.check_output(words, text=True) == "True\n"


MISSED = """
import queue, signal, threading, time
from twotower_contract.processes import interruptible, next_of

def late():
    time.sleep(0.5)  # the main thread waits by now, and the kernel does not wake it for this
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

interruptible()
threading.Thread(target=late).start()
try:
    next_of(queue.SimpleQueue(){limit})
except KeyboardInterrupt:
    print("heard")
"""


@pytest.mark.parametrize("limit", ["", ", 30"])
def test_a_signal_that_does_not_end_the_wait_is_heard(limit) -> None:
    """As one does that comes just before the wait begins."""
    ran = subprocess.run(
        [sys.executable, "-c", MISSED.format(limit=limit)], capture_output=True, timeout=20
    )
    assert ran.stdout == b"heard\n", ran.stderr


@pytest.mark.parametrize("in_main", [True, False])
def test_a_wait_ends_with_an_item_or_in_time(in_main) -> None:
    items: queue.SimpleQueue[int] = queue.SimpleQueue()
    found: list[object] = []

    def wait() -> None:
        found.append(next_of(items))
        with pytest.raises(queue.Empty):
            next_of(items, 0.3)
        found.append("empty")

    items.put(3)
    if in_main:
        wait()
    else:
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(20)
    assert found == [3, "empty"]
