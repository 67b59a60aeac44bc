"""What TensorRT-RTX's compiler makes of full-width towers with a layer of each kind.

TensorRT shares the compiler. What a kernel takes in time needs a GPU; what it moves does not.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

import onnx
import onnx_ir as ir
import pytest

from tests.support import ROOT
from tests.support.sparse_checkpoint import FULL_CONFIG
from twotower_contract.config import ModelConfig
from twotower_contract.layout import graph_weights
from twotower_engines.building.flavours.branches import without_branches
from twotower_export.graph import build_context_graph, build_denoiser_graph
from twotower_export.graph.layers import FLOAT_WEIGHTS

PATTERN = "ME*"
CONTEXT = 8192
LARGE = 100_000  # bytes; what is smaller than this may be moved about
GRAPHS = {"context": (build_context_graph, "tokens"), "denoiser": (build_denoiser_graph, "block")}

pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt-rtx-cu13`")


@pytest.fixture(scope="module", params=[("context", 1), ("denoiser", 1), ("denoiser", 16)], ids=str)
def compiled(request, tmp_path_factory):
    """The kernels of a tower at 1 or 16 rows of 16 tokens, and the graph's inputs."""
    tower, rows = request.param
    build, tokens = GRAPHS[tower]
    values = {"hybrid_override_pattern": PATTERN, "num_hidden_layers": len(PATTERN)}
    config = ModelConfig.from_json(FULL_CONFIG | values)
    weights = graph_weights(config, tower)
    stored = {name: "F32" if name.endswith(FLOAT_WEIGHTS) else "BF16" for name in weights}
    model = without_branches(ir.to_proto(build(config, "bfloat16", stored, {})))
    path = tmp_path_factory.mktemp("compiled") / f"{tower}.onnx"
    onnx.save(model, path)
    sizes = [f"batch={rows}", f"{tokens}=16", f"context={CONTEXT}"]
    command = [sys.executable, str(ROOT / "tests/support/compiled.py"), str(path), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {**json.loads(done.stdout), "weights": set(weights), "tower": tower, "rows": rows}


def written(compiled):
    """Kernel, shape and bytes of everything that is written."""
    for kernel in compiled["kernels"]:
        for _, shape, size in kernel["outputs"]:
            yield kernel["name"], shape, size


def test_no_kernel_copies_or_transposes_a_weight(compiled):
    """A kernel that writes as much as a weight that it reads is a copy of it."""
    copied = [
        (kernel["name"], name)
        for kernel in compiled["kernels"]
        for name, _, size in kernel["inputs"]
        if name in compiled["weights"] and size > LARGE
        if sum(size for *_, size in kernel["outputs"]) >= size
    ]
    assert not copied


def test_attention_is_one_kernel_and_writes_no_scores(compiled):
    assert sum("mha" in kernel["name"] for kernel in compiled["kernels"]) == 1
    scores = 32 * 16 * CONTEXT * compiled["rows"]
    assert not [
        (name, shape)
        for name, shape, _ in written(compiled)
        if {CONTEXT, CONTEXT + 16} & set(shape) and math.prod(shape) >= scores
    ]


def test_a_cache_is_read_once(compiled):
    read = [
        name
        for kernel in compiled["kernels"]
        for name, *_ in kernel["inputs"]
        if name.endswith("_cache")
    ]
    assert sorted(read) == [f"context.layers.2.{kind}_cache" for kind in "kv"]


def test_a_mamba_state_is_read_as_it_lies(compiled):
    """Only the new state is as large as the old one."""
    for kernel in compiled["kernels"]:
        for name, _, size in kernel["inputs"]:
            if name.endswith("ssm_state"):
                large = [made for made, _, bytes_ in kernel["outputs"] if bytes_ >= size]
                assert all(made.endswith("ssm_state_new") for made in large), kernel["name"]


def test_refinement_writes_no_integers_for_each_token(compiled):
    """At 16 rows they were 269 MB."""
    vocabulary = FULL_CONFIG["vocab_size"]
    counters = 8 * 16 * vocabulary * compiled["rows"]
    assert not [
        name for name, shape, size in written(compiled) if vocabulary in shape and size >= counters
    ]


def test_scratch_memory_is_bounded(compiled):
    """Seen: 43 MB at one row, 440 MB at 16, most of it the experts' results before their sum."""
    assert compiled["scratch"] < (100e6 if compiled["rows"] == 1 else 500e6)
