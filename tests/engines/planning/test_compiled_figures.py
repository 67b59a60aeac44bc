"""The planner's table of compiled engines, against the compiler itself."""

from __future__ import annotations

import pytest

from benchmarks.compiled_tables import PATTERN, WAYS, call_of, compiled, scratch_bytes
from tests.support.compiled import TOWERS, config_of
from twotower_contract.traffic import traffic_of
from twotower_engines.planning.compiled import compiled_tower, read_table, value_of_terms
from twotower_engines.planning.plan import WORKSPACE_SLACK
from twotower_export.tiny.checkpoints import tiny_config

ROWS, TOKENS, CONTEXT = 4, 32, 4096


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tower", TOWERS)
def test_the_table_is_what_the_compiler_makes_today(tower, way, tmp_path):
    """Else `python -m benchmarks.compiled_tables` makes it again."""
    pytest.importorskip("tensorrt_rtx")
    listing = compiled(tmp_path, tower, way, ROWS, TOKENS, CONTEXT)
    table = compiled_tower(config_of(PATTERN), tower, way, 2)
    call = traffic_of(listing, call_of(tower, ROWS, 16, CONTEXT))
    for kind, moved in call.by_kind(PATTERN).items():
        count = PATTERN.count(kind) or 1
        assert table.kernels[kind] == pytest.approx(moved.kernels / count, rel=0.1, abs=2), kind
    assert table.call_kernels(PATTERN) == pytest.approx(len(listing.kernels), rel=0.1)
    moved = table.moved_bytes(PATTERN, ROWS, 16, CONTEXT)
    assert moved == pytest.approx(call.moved.total - call.least, rel=0.1)
    needed = scratch_bytes(listing, tower, ROWS, TOKENS, CONTEXT)
    planned = table.scratch_bytes(ROWS, TOKENS, CONTEXT)
    # The largest engine that the table is made of has all layers, and a straight line leads to it.
    assert 0.4 * planned < needed <= WORKSPACE_SLACK * planned


FEW = [
    ("context", "kernels", 16, 1024, 8192 + 1024),
    ("context", "kernels", 16, 1024, 32768 + 1024),
    pytest.param("context", "bodies", 64, 64, 32768 + 64, marks=pytest.mark.slow),
    pytest.param("denoiser", "kernels", 64, 64, 32768 + 64, marks=pytest.mark.slow),
]
"""Tower, way, rows, tokens of each and room of a cache."""


@pytest.mark.parametrize(("tower", "way", "rows", "tokens", "room"), FEW)
def test_engines_for_large_calls_ask_for_no_more_than_is_planned(
    tower, way, rows, tokens, room, tmp_path
):
    """A mask has a row for each token of a chunk: 1 GB at 16 x 1,024 and a context of 32,768."""
    pytest.importorskip("tensorrt_rtx")
    listing = compiled(tmp_path, tower, way, rows, tokens, room)
    planned = compiled_tower(config_of(PATTERN), tower, way, 2).scratch_bytes(rows, tokens, room)
    assert scratch_bytes(listing, tower, rows, tokens, room) <= WORKSPACE_SLACK * planned


WHOLE = [(16, 1024, 8192 + 1024), (16, 1024, 32768 + 1024), (4, 1024, 8192 + 1024), (16, 256, 8448)]


@pytest.mark.slow
@pytest.mark.parametrize("call", WHOLE, ids=str)
def test_whole_towers_for_long_chunks_ask_for_no_more_than_is_planned(call, tmp_path):
    """Few layers share memory otherwise: the released tower asks for up to 1.6 times of theirs."""
    pytest.importorskip("tensorrt_rtx")
    listing = compiled(tmp_path, "context", "kernels", *call, pattern=None)
    planned = compiled_tower(config_of(), "context", "kernels", 2).scratch_bytes(*call)
    assert 0.8 * planned < scratch_bytes(listing, "context", *call) <= WORKSPACE_SLACK * planned


def test_a_narrower_model_moves_less():
    wide, narrow = (
        compiled_tower(config, "denoiser", "bodies", 2)
        for config in (config_of(), tiny_config("*"))
    )
    assert narrow.kernels == wide.kernels
    assert narrow.moved_bytes("*", 1, 16, 64) < wide.moved_bytes("*", 1, 16, 64) / 10
    assert narrow.scratch_bytes(1, 16, 64) < wide.scratch_bytes(1, 16, 64) / 10


def test_terms_are_products_of_a_calls_sizes():
    terms = read_table()["context"]["kernels"]["scratch"]
    assert value_of_terms(dict.fromkeys(terms, 1.0), 1, 1, 1) == len(terms)
    assert value_of_terms({"1": 5, "rows * tokens * tokens": 2}, 3, 4, 9) == 5 + 2 * 3 * 16
