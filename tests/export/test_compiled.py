"""What TensorRT-RTX's compiler makes of full-width towers with a layer of each kind.

TensorRT shares the compiler. What a kernel takes in time needs a GPU; what it moves does not.
"""

from __future__ import annotations

import math

import pytest

from benchmarks import compiled_tables
from tests.support.compiled import compiled as compile_tower
from tests.support.compiled import config_of, copies, write_graph
from tests.support.sparse_checkpoint import FULL_CONFIG
from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_contract.skus import known_skus
from twotower_contract.traffic import read_listings, traffic_of
from twotower_engines.building.flavours.flavour import Order, Target
from twotower_engines.building.flavours.jobs import engine_job
from twotower_engines.building.flavours.process import build_engine_files
from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY, TensorRtRtxFlavour
from twotower_engines.planning.compiled import compiled_tower
from twotower_engines.planning.plan import WORKSPACE_SLACK

PATTERN = "ME*"
CONTEXT = 8192
CAPACITY = CONTEXT + 256  # with room for the largest call
LARGE = 100_000  # bytes; what is smaller than this may be moved about
pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt-rtx-cu13`")


CALLS = [
    ("context", 16, ()),
    *(("denoiser", rows, ()) for rows in (1, 4, 16)),
    ("denoiser", 16, tuple(ROW_LISTS)),
]
"""Tower, rows, and the lists that name all of them."""
RATIOS = {1: 1.03, 4: 1.06, 16: 1.25}
"""Rows to the most that a whole tower may move over the least."""


@pytest.fixture(scope="module", params=CALLS, ids=str)
def compiled(request, tmp_path_factory):
    """The kernels of a tower at 1 to 16 rows of 16 tokens."""
    tower, rows, lists = request.param
    folder = tmp_path_factory.mktemp("compiled")
    return compile_tower(folder, tower, rows, 16, CAPACITY, PATTERN, lists=lists)


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


def test_no_kernel_copies_or_transposes_a_weight_or_a_state(compiled):
    assert not copies(compiled)


def test_attention_is_one_kernel_and_writes_no_scores(compiled):
    assert sum("mha" in kernel.name for kernel in compiled.kernels) == 1
    scores = 32 * 16 * CAPACITY * rows(compiled)
    caches = {one.sizes for one in compiled.inputs if one.name.endswith("_cache")}
    assert not [
        (name, shape)
        for name, shape, _ in written(compiled)
        if CAPACITY in shape and shape not in caches and math.prod(shape) >= scores
    ]


def test_caches_are_updated_in_place_and_read_by_attention_alone(compiled):
    caches = {f"context.layers.2.{kind}_cache_new" for kind in "kv"}
    readers = {}
    for kernel in compiled.kernels:
        written = {one.name for one in kernel.writes}
        for name in caches.intersection(one.name for one in kernel.reads):
            readers.setdefault(name, []).append("update" if name in written else kernel.name)
    assert readers.keys() == caches
    for update, attention in readers.values():
        assert update == "update"
        assert "mha" in attention
    # what went in is named by what comes out: there is no other cache
    touched = (one for kernel in compiled.kernels for one in (*kernel.reads, *kernel.writes))
    large = {one.name for one in touched if CAPACITY in one.sizes and 128 in one.sizes}
    assert large == caches


def test_refinement_writes_no_integers_for_each_token(compiled):
    """At 16 rows they were 269 MB."""
    vocabulary = FULL_CONFIG["vocab_size"]
    counters = 8 * 16 * vocabulary * rows(compiled)
    assert not [
        name for name, shape, size in written(compiled) if vocabulary in shape and size >= counters
    ]


def moved_of_list(listing, name, call):
    """Bytes of the kernels that take a list of rows, or what is computed of the rows' tokens."""
    dim, vocabulary = ROW_LISTS[name], FULL_CONFIG["vocab_size"]
    return sum(
        moved.total
        for kernel, moved in traffic_of(listing, call).kernels
        if any(
            one.name == name or {dim, vocabulary} <= set(one.sizes)
            for one in (*kernel.reads, *kernel.writes)
        )
    )


def test_noise_entropy_and_logits_cost_nothing_where_no_row_asks_for_them(tmp_path):
    """In an engine of any size, as users build them. Before, all three were made in each step."""
    listing = compiled_tables.compiled(tmp_path, "denoiser", "bodies", 16, 64, CONTEXT, "M")
    assert not listing.unsized
    for rows in (1, 16):
        none = compiled_tables.call_of("denoiser", rows, 16, CONTEXT)
        logits = 2 * rows * 16 * FULL_CONFIG["vocab_size"]
        step = traffic_of(listing, none).by_kind("M")["ends"]
        # seen: 5.6 and 5.1 times; it was 22
        assert step.total - step.least < 6 * logits
        shown = [one for kernel in listing.kernels for one in kernel.writes if one.name == "logits"]
        assert [one.bytes(none) for one in shown] == [0]
        # read once, and for noise written in float32 and read again
        for name, times in (("sampled_rows", 5), ("entropy_rows", 1), ("logits_rows", 2)):
            assert moved_of_list(listing, name, none) < 1e6, "numbers of the vocabulary's tokens"
            moved = moved_of_list(listing, name, none | {ROW_LISTS[name]: rows})
            assert moved == pytest.approx(times * logits, abs=1e6)


def ratio_of_whole(listing, pattern):
    """What a whole tower moves over the least, if its layers move what these do."""
    kinds, whole = traffic_of(listing).by_kind(pattern), FULL_CONFIG["hybrid_override_pattern"]
    counts = {kind: (whole.count(kind) or 1) / (pattern.count(kind) or 1) for kind in kinds}
    moved = sum(counts[kind] * one.total for kind, one in kinds.items())
    return moved / sum(counts[kind] * one.least for kind, one in kinds.items())


def test_a_whole_tower_moves_hardly_a_byte_twice(compiled):
    """Seen: 1.17 of the least at 16 rows, 1.04 at 4, 1.01 at one."""
    assert ratio_of_whole(compiled, PATTERN) < RATIOS[rows(compiled)]


def test_experts_write_their_activations_and_no_other_result_of_theirs(compiled):
    names = ("n_routed_experts", "moe_intermediate_size", "hidden_size")
    experts, inner, hidden = (FULL_CONFIG[name] for name in names)
    tokens = 16 * rows(compiled)
    results = [
        shape
        for _, shape, _ in written(compiled)
        if math.prod(shape) >= experts * min(inner, hidden) * tokens and experts in shape
    ]
    assert results == [(experts, inner, tokens)]


def test_scratch_memory_is_bounded_and_planned(compiled):
    """Seen: 212 MB at 16 rows that draw, of which the sampled logits are 134 and the logits 67."""
    tower = "denoiser" if any(one.name == "new_ids" for one in compiled.outputs) else "context"
    planned = compiled_tower(config_of(PATTERN), tower, "bodies", 2)
    assert compiled.scratch < (50e6 if rows(compiled) == 1 else 250e6)
    if rows(compiled) == 16:  # for fewer, the step alone is made otherwise than for a range of rows
        assert compiled.scratch <= WORKSPACE_SLACK * planned.scratch_bytes(16, 16, CAPACITY)


@pytest.mark.slow
@pytest.mark.parametrize(("sku", "slots"), [("rtx-pro-6000", 1), ("rtx-pro-6000", 16), ("a10", 16)])
@pytest.mark.parametrize("tower", compiled_tables.TOWERS)
def test_an_engine_of_the_flavour_asks_for_no_more_than_is_planned(tower, sku, slots, tmp_path):
    """And says that it allocates nothing by itself: contexts get their memory from the runtime."""
    limits = Limits(slots=slots, context=CONTEXT, max_tokens_per_call=256, block_size_max=64)
    target = Target(known_skus()[sku], limits, "bf16")
    recipe = TensorRtRtxFlavour().recipe(tower, target)
    path = write_graph(tmp_path, tower, compiled_tables.PATTERN)
    job = engine_job(Order(path, tmp_path / "engine.plan", recipe))
    built = build_engine_files(LIBRARY, {tower: job}, 1, lambda tower, text: None)
    assert "REQUIRE_USER_ALLOCATION" in built[tower]["flags"]
    _, (listing,) = read_listings(tmp_path / "engine.traffic.json")
    tokens = 256 if tower == "context" else 64
    planned = compiled_tower(config_of(compiled_tables.PATTERN), tower, "bodies", 2)
    assert listing.scratch <= WORKSPACE_SLACK * planned.scratch_bytes(slots, tokens, CONTEXT)
    # an output of a size that no input has would be allocated when a run tells it
    known = {size for one in listing.inputs for size in one.sizes}
    sizes = {size for one in listing.outputs for size in one.sizes if isinstance(size, str)}
    assert sizes <= known


def test_experts_write_as_little_where_a_call_decides_how_many_tokens_there_are(tmp_path):
    """TensorRT would copy activations of a number of tokens that it cannot divide by eight."""
    listing = compiled_tables.compiled(tmp_path, "context", "bodies", 16, 256, CONTEXT, "E")
    assert not listing.unsized
    call = compiled_tables.call_of("context", 16, 16, CONTEXT)
    experts, inner = FULL_CONFIG["n_routed_experts"], FULL_CONFIG["moe_intermediate_size"]
    activations = 2 * experts * inner * 256
    sizes = [one.bytes(call) for kernel in listing.kernels for one in kernel.writes]
    assert [size for size in sizes if size >= activations] == [activations]


@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_what_tensorrt_compiles_between_our_plugins_moves_little_twice(tower, tmp_path):
    """Plugins read and write across the edge of what is compiled: 1.09 of the least was seen."""
    pattern = "MEM*EM"
    listing = compile_tower(tmp_path, tower, 16, 16, CAPACITY, pattern, is_cut=True)
    assert not copies(listing)
    assert ratio_of_whole(listing, pattern) < 1.1
    assert listing.scratch < 100e6
    wide = [one for _, one, size in written(listing) if size == 4 * 16 * 16 * 2688]
    assert not wide, "tokens in float32"


@pytest.mark.parametrize(("tower", "rows", "tokens"), [("context", 1, 256), ("denoiser", 4, 16)])
def test_where_caches_are_copied_they_are_copied_once(tower, rows, tokens, tmp_path):
    """For 8.6, TensorRT-RTX copied each cache 16 times, once for every query head.

    With heads folded, the mask of a chunk of 256 tokens was repeated 16 times: 99 MB of scratch.
    """
    listing = compile_tower(tmp_path, tower, rows, tokens, CAPACITY, "*", capability="8.6")
    outputs = {one.name for one in listing.outputs}
    large = [
        one.bytes(listing.usual)
        for kernel in listing.kernels
        for one in kernel.writes
        if CAPACITY in one.sizes and one.name not in outputs
    ]
    cache = 2 * math.prod((rows, 2, CAPACITY, 128))
    assert max(large) == cache
    mask = 2 * rows * CAPACITY * (tokens if tower == "context" else 1)
    assert abs(sum(large) - 2 * cache - mask) < LARGE, "keys, values and the mask, once each"
    assert listing.scratch < (50e6 if tower == "context" else 200e6)
