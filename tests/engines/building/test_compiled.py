"""Kernels out of a builder's log: those that TensorRT-RTX says, and lines written by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.support import ROOT
from tests.support.compiled import TOWERS, compiled, config_of, copies, write_graph
from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_contract.skus import known_skus
from twotower_contract.traffic import Tensor, read_listings, traffic_of, write_listings
from twotower_engines.building.flavours.compiled import BuilderLog, layer_of, sizes_of
from twotower_engines.building.flavours.flavour import Order, Target
from twotower_engines.building.flavours.jobs import engine_job, engine_recipe
from twotower_engines.building.flavours.process import build_engine_files
from twotower_engines.building.flavours.profiles import narrow_profiles
from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY, TensorRtRtxFlavour
from twotower_engines.planning.compiled import compiled_tower
from twotower_engines.planning.plan import WORKSPACE_SLACK

LIMITS = Limits(slots=16, context=2048, max_tokens_per_call=256, block_size_max=64)
PATTERN = "M*E*"
"""The first layer of attention computes what the second one reads, too."""


@pytest.fixture(scope="module", params=TOWERS)
def built(request, tmp_path_factory):
    """A tower of full width as the flavour builds it, and what the builder reported."""
    tower, folder = request.param, tmp_path_factory.mktemp("compiled")
    graph = write_graph(folder, tower, PATTERN)
    recipe = TensorRtRtxFlavour().recipe(
        tower, Target(known_skus()["rtx-pro-6000"], LIMITS, "bf16")
    )
    job = engine_job(Order(graph, folder / f"{tower}.plan", recipe))
    report = build_engine_files(LIBRARY, {tower: job}, 1, lambda name, text: None)[tower]
    source, (listing,) = read_listings(folder / f"{tower}.traffic.json")
    assert source == "the builder's log"
    return tower, listing, report


@pytest.fixture(scope="module")
def open_sizes(built, tmp_path_factory):
    """The listing for calls of any size, that of a build for one call, and the call's sizes.

    Each list of rows names all of them.
    """
    tower, listing, _ = built
    call = {"batch": 4, TOWERS[tower][1]: 32, "context": LIMITS.cache_tokens}
    folder = tmp_path_factory.mktemp("fixed")
    fixed = compiled(folder, tower, *call.values(), PATTERN, lists=ROW_LISTS)
    return listing, fixed, call | dict.fromkeys(ROW_LISTS.values(), 4)


def test_no_memory_is_allocated_when_an_engine_runs(built):
    """Contexts get scratch memory from the runtime, and outputs have sizes of inputs."""
    _, listing, report = built
    assert "REQUIRE_USER_ALLOCATION" in report["flags"]
    known = {size for one in listing.inputs for size in one.sizes}
    sizes = {size for one in listing.outputs for size in one.sizes if isinstance(size, str)}
    assert sizes <= known


def test_the_largest_call_takes_no_more_scratch_memory_than_is_planned(built):
    tower, listing, _ = built
    most = LIMITS.max_tokens_per_call if tower == "context" else LIMITS.block_size_max
    planned = compiled_tower(config_of(PATTERN), tower, "bodies", 2)
    assert (
        0
        < listing.scratch
        <= WORKSPACE_SLACK * planned.scratch_bytes(LIMITS.slots, most, LIMITS.cache_tokens)
    )


def named_sizes(listing, call):
    """Bytes of what is written under a name of the graph's, without the number of its part.

    A list of the tiles of a mask is none of these: one tile may serve many tokens.
    """
    tensors = (one for kernel in listing.kernels for one in kernel.writes)
    return {
        re.sub(r"_myl\d+$", "", one.name): one.bytes(call)
        for one in tensors
        if not one.name.startswith("__my") and "_sca_" not in one.name
    }


def test_sizes_that_a_call_decides_are_found(open_sizes):
    """Each tensor of a name of its own has the size that a build for this one call says."""
    listing, fixed, call = open_sizes
    assert not listing.unsized
    wanted = named_sizes(fixed, call)
    checked = {
        name: (size, wanted[name])
        for name, size in named_sizes(listing, call).items()
        if name in wanted
    }
    assert len(checked) > 15
    assert {name: pair for name, pair in checked.items() if pair[0] != pair[1]} == {}
    small, large = traffic_of(fixed), traffic_of(listing, call)
    assert large.least == small.least
    assert set(large.by_kind(PATTERN)) == {"M", "E", "*", "ends"}
    ratio = large.ratio / small.ratio
    assert 1 <= ratio < 1.01, "1.003 was seen"


def integer_bytes(listing, call):
    written = (one for kernel in listing.kernels for one in kernel.writes)
    return sum(one.bytes(call) for one in written if one.type.startswith("INT"))


def test_integers_beside_a_cache_or_a_mask_are_not_as_large(open_sizes):
    """Places of a call's rows in the caches, and lists of tiles; neither is any layer's result."""
    listing, fixed, call = open_sizes
    more = integer_bytes(listing, call) - integer_bytes(fixed, call)
    assert more < 200_000, "integers: a cache of them has 9.4 million bytes, a mask 1.2"
    assert not copies(listing)


def test_every_weight_is_read_by_a_kernel_of_its_layer(open_sizes):
    listing, _, _ = open_sizes
    heavy = {
        one.name: kernel.layer
        for kernel in listing.kernels
        for one in kernel.reads
        if ".mixer." in one.name and one.bytes({}) > 1e6
    }
    assert len(heavy) > 8
    assert all(f".layers.{layer}." in name for name, layer in heavy.items())


def test_a_listing_survives_its_file(open_sizes, tmp_path):
    listing, _, _ = open_sizes
    write_listings(tmp_path / "again.json", "a test", [listing, replace(listing, profile="two")])
    source, read = read_listings(tmp_path / "again.json")
    assert (source, read[0], read[1].profile) == ("a test", listing, "two")


@pytest.mark.parametrize(("expression", "factors"), [
    ("2688", (2688,)),
    ("batch", ("batch",)),
    ("(* batch block)", ("batch", "block")),
    ("(* 2 (+ context block) batch)", (2, "context + block", "batch")),
    ("(+ tokens 3)", ("tokens + 3",)),
    ("(/ tokens 2)", ()),
    ("(MUL_ADD batch tokens 7)", ()),
    ("(CEIL_DIV tokens 8)", ()),
    ("(* 4 (CEIL_DIV tokens 8))", ()),
    ("(* 8 (CEIL_DIV (+ (MUL_ADD batch tokens 7) -7) 8))", ("batch", "tokens")),
])  # fmt: skip
def test_expressions_of_sizes(expression, factors):
    assert sizes_of(expression) == factors
    call = {"batch": 2, "block": 16, "context": 32, "tokens": 5}
    expected = {"2688": 2688, "(* 2 (+ context block) batch)": 2 * 48 * 2, "(+ tokens 3)": 8}
    if expression in expected:
        assert Tensor("x", factors, "INT8").bytes(call) == expected[expression]


def test_the_layer_of_a_kernel():
    assert layer_of("[ONNX Layer: a | context.layers.7 (ContextMambaLayer)]", ()) == 7
    assert layer_of("", (Tensor("scale_shift_tables.3", (3, 8), "BF16"),)) == 3
    everywhere = "".join(f"[ONNX Layer: a | denoiser.layers.{n} (X)]" for n in range(3))
    assert layer_of(everywhere, ()) is None
    assert layer_of("denoiser.refine", ()) is None


def test_each_profile_has_its_kernels(tmp_path):
    graph = write_graph(tmp_path, "denoiser", "M")
    limits = replace(LIMITS, slots=2)
    recipe = engine_recipe(narrow_profiles("denoiser", limits))
    job = engine_job(
        Order(graph, tmp_path / "two.plan", recipe | {"compute_capabilities": ["8.9"]})
    )
    build_engine_files(LIBRARY, {"two": job}, 1, lambda name, text: None)
    _, listings = read_listings(tmp_path / "two.traffic.json")
    assert [one.profile for one in listings] == ["rows-1", "rows-2"]
    for rows, listing in enumerate(listings, start=1):
        (head,) = (one for one in listing.kernels if "head.gemm" in one.name)
        logits = 2 * rows * 16 * config_of().vocab_size
        assert sum(one.bytes(listing.usual) for one in head.writes) == logits


def test_what_nobody_says_is_named_and_left_out():
    log = BuilderLog()
    kernel = (
        "Name: k_myl0_3, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,4], Strides: [4,1], "
        "StrideOrder: [1,0], Datatype: Float, Format: (Linear) }], Constants: [], Outputs: "
        "[ { Name: y, Dimensions: [7], Strides: [1], StrideOrder: [0], Datatype: Float, Format: "
        "(Linear) }], TacticName: k, StreamId: 0, Metadata: "
    )
    log.take(f"Layers:\n{kernel}")
    log.take("Max Scratch Memory: 4096 bytes")
    (listing,) = log.listings(((), ()), [("all", {})])
    assert (listing.unsized, listing.scratch) == (("x",), 4096)
    assert [(one.reads, one.writes[0].sizes) for one in listing.kernels] == [((), (7,))]


def test_the_released_width_is_what_is_compiled():
    assert config_of(PATTERN).hidden_size == config_of().hidden_size == 2688


BARS = {"bodies": {1: 1.03, 4: 1.06, 16: 1.25}, "cut at plugins": dict.fromkeys((1, 4, 16), 1.10)}
"""Form, then rows of 16 tokens, to the most that a call may move over the least."""


def test_what_was_measured_at_full_size_is_within_the_bars_and_what_the_documents_say():
    path = max((ROOT / "benchmarks" / "results").glob("traffic-rtx-2*.json"))
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    greedy = [r for r in results if r["tokens"] == 16 and not r["lists"]]
    blocks = {(r["form"], r["tower"], r["rows"]): r for r in greedy}
    page = (ROOT / "docs" / "build.md").read_text(encoding="utf-8")
    titles = {"bodies": "function bodies", "cut at plugins": "cut at our plugins"}
    for form, most in BARS.items():
        for tower in TOWERS:
            calls = [blocks[form, tower, rows] for rows in most]
            assert all(one["ratio"] <= most[one["rows"]] for one in calls)
            ratios = " | ".join(f"{one['ratio']:.2f}" for one in calls)
            scratch = calls[-1]["scratch_bytes"] / 1e6
            assert scratch < 250
            assert f"| {titles[form]}, {tower} | {ratios} | {scratch:.0f} MB |" in page
    drawn = {r["rows"]: r for r in results if r["lists"] == ["sampled_rows"]}
    ratios = " | ".join(f"{drawn[rows]['ratio']:.2f}" for rows in (1, 4, 16))
    scratch = drawn[16]["scratch_bytes"] / 1e6
    assert f"| the same, rows that draw noise | {ratios} | {scratch:.0f} MB |" in page
    assert not any(one["copied_inputs"] for one in results)
    assert ("cut at plugins", 1024) in {(one["form"], one["tokens"]) for one in results}
