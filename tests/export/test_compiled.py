"""What TensorRT-RTX's compiler makes of full-width towers with a layer of each kind.

TensorRT shares the compiler. What a kernel takes in time needs a GPU; what it moves does not.
"""

from __future__ import annotations

import math

import pytest

from tests.support.compiled import compiled as compile_tower
from tests.support.sparse_checkpoint import FULL_CONFIG
from twotower_contract.traffic import traffic_of

PATTERN = "ME*"
CONTEXT = 8192
LARGE = 100_000  # bytes; what is smaller than this may be moved about
pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt-rtx-cu13`")


@pytest.fixture(scope="module", params=[("context", 1), ("denoiser", 1), ("denoiser", 16)], ids=str)
def compiled(request, tmp_path_factory):
    """The kernels of a tower at 1 or 16 rows of 16 tokens."""
    tower, rows = request.param
    return compile_tower(tmp_path_factory.mktemp("compiled"), tower, rows, 16, CONTEXT, PATTERN)


def rows(compiled):
    return compiled.usual["batch"]


def written(compiled):
    """Kernel, shape and bytes of everything that is written."""
    for kernel in compiled.kernels:
        for one in kernel.writes:
            yield kernel.name, one.sizes, one.bytes({})


def test_all_that_kernels_touch_has_a_size(compiled):
    assert not compiled.unsized
    kinds = traffic_of(compiled).by_kind(PATTERN)
    assert list(kinds) == ["M", "E", "*", "ends"]
    assert sum(one.kernels for one in kinds.values()) == len(compiled.kernels) > 40


def test_no_kernel_copies_or_transposes_a_weight(compiled):
    """A kernel that writes as much as a weight that it reads is a copy of it."""
    copies = [name for _, name, _ in traffic_of(compiled).copies]
    assert not [name for name in copies if not name.startswith("context.")]


def test_attention_is_one_kernel_and_writes_no_scores(compiled):
    assert sum("mha" in kernel.name for kernel in compiled.kernels) == 1
    scores = 32 * 16 * CONTEXT * rows(compiled)
    assert not [
        (name, shape)
        for name, shape, _ in written(compiled)
        if {CONTEXT, CONTEXT + 16} & set(shape) and math.prod(shape) >= scores
    ]


def test_a_cache_is_read_once(compiled):
    read = [
        one.name
        for kernel in compiled.kernels
        for one in kernel.reads
        if one.name.endswith("_cache")
    ]
    assert sorted(read) == [f"context.layers.2.{kind}_cache" for kind in "kv"]


def test_a_mamba_state_is_read_as_it_lies(compiled):
    """Only the new state is as large as the old one."""
    assert not [name for _, name, _ in traffic_of(compiled).copies if name.endswith("ssm_state")]


def test_refinement_writes_no_integers_for_each_token(compiled):
    """At 16 rows they were 269 MB."""
    vocabulary = FULL_CONFIG["vocab_size"]
    counters = 8 * 16 * vocabulary * rows(compiled)
    assert not [
        name for name, shape, size in written(compiled) if vocabulary in shape and size >= counters
    ]


def test_scratch_memory_is_bounded(compiled):
    """Seen: 43 MB at one row, 440 MB at 16, most of it the experts' results before their sum."""
    assert compiled.scratch < (100e6 if rows(compiled) == 1 else 500e6)
