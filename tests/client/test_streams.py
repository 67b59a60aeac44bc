"""Standard streams as callers leave them, and the options that every verb has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import TWOTOWER
from tests.support.command import twotower


def shell(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `twotower "$@"` as a shell script that redirects it."""
    words = ["bash", "-c", script.replace("TWOTOWER", '"$@"'), "x", *TWOTOWER, *arguments]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def test_a_full_standard_output_is_told_in_one_line() -> None:
    for arguments in (["doctor"], ["--help"], ["--version"]):
        ran = shell("TWOTOWER >/dev/full", *arguments)
        assert ran.returncode == 2
        assert ran.stderr.count("\n") == 1, ran.stderr
        assert "No space left on device" in ran.stderr


def test_a_reader_may_take_the_first_line_alone(tmp_path: Path) -> None:
    for number in range(1000):  # less than a pipe holds, and more than a reader waits for
        (tmp_path / "twotower" / f"engines-{number}").mkdir(parents=True)
    script = "set -o pipefail; TWOTOWER | head -1"
    ran = shell(script, "cache", "list", XDG_CACHE_HOME=str(tmp_path))
    assert (ran.returncode, ran.stdout.count("\n")) == (0, 1), ran.stderr


def test_closed_and_full_standard_errors_disturb_nothing(tmp_path: Path) -> None:
    for number, redirection in enumerate(("2>&-", "2>/dev/full", "<&- 2>&-", ">&- 2>&-")):
        out = tmp_path / str(number)
        ran = shell(f"TWOTOWER {redirection}", "tiny", str(out), "--pretrained")
        assert ran.returncode == 0
        assert (out / "config.json").is_file()
        # nothing that was opened later took the place of a closed stream
        assert "error" not in (out / "config.json").read_text()
        refused = shell(f"TWOTOWER {redirection}", "inspect", str(tmp_path / "none"))
        assert refused.returncode == 2
        assert refused.stdout == ""


def test_quiet_and_log(path_folders: Path, tmp_path: Path) -> None:
    log = tmp_path / "all.log"
    words = ["export", path_folders / "checkpoint", tmp_path / "bundle", "--log", log]
    ran = twotower(*words, "--quiet")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "its revision is unknown" in log.read_text()
    refused = twotower("export", tmp_path, tmp_path / "no", "-q", "--log", log)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.strip() in log.read_text()


def test_verbose_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    assert "Traceback" not in twotower("inspect", tmp_path).stderr
    ran = twotower("inspect", tmp_path, "-v")
    assert ran.returncode == 2
    assert "Traceback" in ran.stderr


def test_a_log_that_cannot_be_written_is_refused() -> None:
    ran = twotower("doctor", "--log", "/proc/none/x")
    assert ran.returncode == 2
    assert "/proc/none/x" in ran.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace needs root here")
@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny", "{full}/out", "--pretrained"],
        ["export", "{checkpoint}", "{full}/out", "--target", "tensorrt-llm"],
        ["export", "{checkpoint}", "{full}/out"],
    ],
    ids=" ".join,
)
def test_a_full_disk_is_blamed_on_the_destination(
    path_folders: Path, tmp_path: Path, arguments: list[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    words = [one.format(full=full, checkpoint=path_folders / "checkpoint") for one in arguments]
    script = (
        f"mount -t tmpfs -o size=64k none {full} && TWOTOWER; code=$?; ls -A {full}; exit $code"
    )
    mounted = ["unshare", "-m", "bash", "-c", script.replace("TWOTOWER", '"$@"'), "x"]
    ran = subprocess.run([*mounted, *TWOTOWER, *words], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    last = ran.stderr.splitlines()[-1]
    assert last.startswith(f"error: {full}/out"), last
    assert ran.stdout == ""  # nothing was left there


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace needs root here")
@pytest.mark.parametrize("kind", ["-t tmpfs none", "--bind {other}"])
def test_an_output_folder_that_is_a_mount_point(tmp_path: Path, kind: str) -> None:
    """A bind mount of the same file system is no mount point for `ismount`; rename tells."""
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    other.mkdir()
    script = f"mount {kind.format(other=other)} {out} && TWOTOWER"
    mounted = ["unshare", "-m", "bash", "-c", script.replace("TWOTOWER", '"$@"'), "x"]
    words = [*mounted, *TWOTOWER, "tiny", str(out), "--pretrained"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert f"error: {out}: is a mount point" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
@pytest.mark.parametrize("home", [None, "/"])
def test_a_user_without_a_home(tmp_path: Path, home: str | None) -> None:
    """As containers are started with `--user 12345`; the modules are read before, as root."""
    code = (
        "import os, sys, importlib, twotower_client.cli as c\n"
        "for v in ('twotower_engines.cli.build', 'twotower_engines.building.build_cache'):\n"
        "    importlib.import_module(v)\n"
        "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
        "from twotower_engines.building.build_cache import EngineCache\n"
        "try:\n    EngineCache()\n"
        "except Exception as problem:\n    print(type(problem).__name__, problem)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    if home is not None:
        environment["HOME"] = home
    said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment)
    assert said.startswith("BuildError ")
    assert "set XDG_CACHE_HOME to a folder that can be written" in said


FOREIGN = """
import asyncio, importlib.abc, os, signal, sys, tempfile, subprocess, shutil, concurrent.futures
GONE = {"fcntl", "resource", "pwd", "grp", "termios"}
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in GONE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
for name in GONE:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Gone())
for module, names in ((os, "sched_getaffinity sysconf pread preadv killpg geteuid pidfd_open"),
                      (signal, "SIGHUP SIGKILL pthread_sigmask sigwait SIGSTOP SIGCONT")):
    for name in names.split():
        delattr(module, name) if hasattr(module, name) else None
sys.argv = ["twotower", *sys.argv[1:]]
from twotower_client.cli import main
main()
"""


def test_what_works_beside_linux_simulated(path_folders: Path, tmp_path: Path) -> None:
    """A simulation: this system, without what Windows (and in part macOS) has not."""
    checkpoint = path_folders / "checkpoint"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", FOREIGN, *arguments]
        return subprocess.run(words, capture_output=True, text=True, timeout=120)

    for words in (
        ["doctor"],
        ["inspect", str(checkpoint)],
        ["plan", str(checkpoint), "--sku", "h200"],
    ):
        ran = run(*words)
        assert ran.returncode == 0, ran.stderr
    asked = run("generate", "hi", "--url", "127.0.0.1:9")
    assert asked.stderr.startswith("error: no Triton server answers")
    written = run("tiny", str(tmp_path / "other"), "--pretrained")
    assert written.returncode == 2
    assert "`twotower tiny` runs on Linux only" in written.stderr


def test_the_cache_is_listed_and_cleaned(tmp_path: Path) -> None:
    cached = tmp_path / "twotower"
    for name in ("builds/key", "builds/locks", "timing", "0123abcd"):
        (cached / name).mkdir(parents=True)
    (cached / "builds" / "key" / "plan").write_bytes(b"x" * 2_000_000)
    (cached / "builds" / "locks" / "key").touch()
    (cached / "timing" / "h200.cache").touch()

    def run(*arguments: str) -> str:
        return twotower("cache", *arguments, XDG_CACHE_HOME=str(tmp_path)).stdout

    assert "2.0 MB" in run("list")
    assert "builds/key" in run("list")
    assert run("clean", "--older-than", "1").startswith("deleted 0 entries")
    assert run("clean", "--dry-run").startswith("would delete 3 entries, 2.0 MB")
    assert (cached / "builds" / "key").is_dir()
    assert run("clean").startswith("deleted 3 entries")
    assert [path.name for path in cached.rglob("*") if path.is_file()] == ["key"]  # the lock
