"""Questions to the operating system."""

from __future__ import annotations

import os
from pathlib import Path

from twotower_contract import machine


def test_pages_that_only_cache_files_are_available(monkeypatch):
    """Else two full-size towers are built one after the other where files were read before."""
    text = (
        "MemTotal: 24684352 kB\nMemFree: 102400 kB\nMemAvailable: 20480000 kB\nHugePages_Free: 0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda path, encoding=None: text)
    assert machine.available_bytes() == 20_480_000 * 1024


def test_available_memory_is_part_of_the_machines():
    assert 0 < machine.available_bytes() <= machine.memory_bytes()
    assert 1 <= machine.cores() <= os.cpu_count()


def test_a_system_without_that_file_says_nothing(monkeypatch):
    def absent(path, encoding=None):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert machine.available_bytes() == 0
