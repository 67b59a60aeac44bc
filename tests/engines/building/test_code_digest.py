"""Cache keys know the sources that make what they name, also after a move."""

from __future__ import annotations

import pytest

from twotower_engines.building import build
from twotower_engines.building import checkpoint_engines as cache
from twotower_engines.building.code_digest import code_digest
from twotower_engines.building.flavours import tensorrt


@pytest.mark.parametrize(
    "patterns", [build.ENGINE_CODE, build.SET_CODE, tensorrt.KERNEL_CODE, cache.CODE]
)
def test_every_pattern_in_use_matches(patterns):
    assert len(code_digest(*patterns)) == 64


@pytest.mark.parametrize("pattern", ["made_up/nowhere/*.py", "made_up/gone.py", "made_up/sub"])
def test_a_pattern_without_a_file_is_refused(sources, pattern):
    with pytest.raises(ValueError, match=f"{pattern.replace('*', '.')}.*matches no file"):
        code_digest("made_up/*.py", pattern)


def test_an_absent_package_is_refused():
    with pytest.raises(ValueError, match="no package 'twotower_nowhere'"):
        code_digest("twotower_nowhere/*.py")


def test_content_and_place_both_count(sources):
    first = code_digest("made_up/**/*.py")
    (sources / "one.py").write_text("a = 2\n")
    changed = code_digest("made_up/**/*.py")
    (sources / "one.py").rename(sources / "two.py")
    assert len({first, changed, code_digest("made_up/**/*.py")}) == 3


@pytest.fixture
def sources(tmp_path, monkeypatch):
    folder = tmp_path / "made_up"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder
