"""Files and folders that appear whole or not at all, and what killed processes leave."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from twotower_contract import atomic
from twotower_contract.atomic import (
    check_file,
    check_replaceable,
    given_path,
    locked,
    new_folder,
    partial_file,
    partial_folder,
    put_in_place,
    reported,
    write_text,
)
from twotower_contract.errors import BundleError


def test_a_partial_folder_that_is_in_use_is_not_removed(tmp_path):
    with partial_folder(tmp_path) as first, partial_folder(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_an_abandoned_partial_folder_is_removed(tmp_path):
    abandoned = tmp_path / ".partial-of-a-killed-process"
    (abandoned / "set").mkdir(parents=True)
    with partial_folder(tmp_path):
        assert not abandoned.exists()


def test_a_folder_takes_the_place_of_another(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    with partial_folder(tmp_path) as work:
        (work / "made").mkdir()
        (work / "made" / "new").touch()
        put_in_place(work / "made", tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def replaced_by(folder, content):
    """A folder `target` that holds a file of this name, put in place of what was there."""
    with partial_folder(folder) as work:
        (work / "made").mkdir()
        (work / "made" / content).touch()
        put_in_place(work / "made", folder / "target")


def test_a_reader_finds_the_old_or_the_new_and_never_nothing(tmp_path):
    replaced_by(tmp_path, "0")
    missing, done = [], threading.Event()

    def read():
        while not done.is_set():
            if not (tmp_path / "target").exists():
                missing.append(1)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(200):
        replaced_by(tmp_path, str(number))
    done.set()
    thread.join()
    assert not missing
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["199"]


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_where_names_cannot_be_exchanged_nothing_is_lost(tmp_path, monkeypatch, killed_at):
    """A file system like NFS, and a process that is killed before each of three renames."""
    replaced_by(tmp_path, "old")
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    rename, count = Path.rename, []

    def rename_or_die(path, target):
        count.append(path)
        if len(count) == killed_at:
            raise SystemExit("killed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_die)
    with pytest.raises(SystemExit):
        replaced_by(tmp_path, "new")
    monkeypatch.setattr(Path, "rename", rename)
    with partial_folder(tmp_path):
        found = [path.name for path in (tmp_path / "target").iterdir()]
    assert found == (["new"] if killed_at == 3 else ["old"])
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_waiting_for_a_lock_is_said(tmp_path):
    said, waits = [], threading.Event()

    def take():
        with locked(tmp_path, waits.set):
            said.append("taken")

    with locked(tmp_path, lambda: said.append("no")):
        other = threading.Thread(target=take)
        other.start()
        assert waits.wait(60)
        said.append("released")
    other.join()
    assert said == ["released", "taken"]


def test_a_folder_that_is_to_stay_stays(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    with partial_folder(tmp_path) as work:
        (work / "made").mkdir()
        put_in_place(work / "made", tmp_path / "target", replace=False)
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_lock_is_released_at_the_end(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, "old")

    def write_half():
        with partial_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    write_text(tmp_path / "file", "")
    place = tmp_path / "file" / "inside.json"
    message = f"^{place}: cannot be written: Not a directory; name another path"
    with pytest.raises(BundleError, match=message), reported(place, BundleError):
        write_text(place, "")
    with (
        pytest.raises(BundleError, match="file: cannot be written: "),
        new_folder(place, BundleError),
    ):
        pytest.fail("the folder cannot be made")


def test_a_full_disk_is_named_by_the_path_that_was_given(tmp_path):
    with (
        pytest.raises(BundleError, match=f"^{tmp_path}/out: .*; make room there"),
        new_folder(tmp_path / "out", BundleError) as folder,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "plan"))
    assert given_path("a/.partial-x1/sku/context.plan") == "a/sku/context.plan"
    assert given_path("a/.partial-x1") == "a"
    assert given_path("a/page.html.123.partial") == "a/page.html"


def test_a_device_or_pipe_is_written_and_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(check_file(pipe), "page")
    assert os.read(reader, 10) == b"page"
    assert pipe.is_fifo()
    os.close(reader)


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(check_file(tmp_path / "link"), "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_new_folder_is_readable_by_others_and_replaces_what_a_link_names(tmp_path):
    real = tmp_path / "elsewhere" / "real"
    real.mkdir(parents=True)
    (real / "old").touch()
    (tmp_path / "link").symlink_to(real)
    with new_folder(tmp_path / "link", BundleError) as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [one.name for one in real.iterdir()] == ["new"]
    assert real.stat().st_mode & 0o777 == 0o755
    assert [one.name for one in real.parent.iterdir()] == ["real"]


@pytest.mark.parametrize("problem", [KeyboardInterrupt, ValueError])
def test_a_new_folder_that_fails_leaves_the_old_one(tmp_path, problem):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()

    def write_half():
        with new_folder(tmp_path / "out", BundleError) as folder:
            (folder / "new").touch()
            raise problem

    with pytest.raises(problem):
        write_half()
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["old"]
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


def test_only_what_is_ours_may_be_replaced(tmp_path):
    def check(out):
        check_replaceable(out, "a bundle", lambda folder: (folder / "ours").exists(), BundleError)

    check(tmp_path / "absent")
    check(tmp_path)
    (tmp_path / "theirs").touch()
    with pytest.raises(BundleError, match="holds files that are not a bundle"):
        check(tmp_path)
    with pytest.raises(BundleError, match="is a file; name a folder for a bundle"):
        check(tmp_path / "theirs")
    (tmp_path / "ours").touch()
    check(tmp_path)
