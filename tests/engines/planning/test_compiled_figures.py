"""The planner's table of compiled engines, against the compiler itself."""

from __future__ import annotations

import pytest

from benchmarks.compiled_tables import PATTERN, WAYS, call_of, compiled
from tests.support.compiled import TOWERS, config_of
from twotower_contract.traffic import traffic_of
from twotower_engines.planning.compiled import compiled_tower, read_table, value_of_terms
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
    if way != "kernels":
        scratch = table.scratch_bytes(ROWS, TOKENS, CONTEXT)
        # A straight line from the smallest engine to the largest may plan too much between them.
        assert listing.scratch > 0.7 * scratch
        assert listing.scratch <= 1.1 * scratch, "a plan of memory leaves a tenth"


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
