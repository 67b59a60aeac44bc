"""Towers of the released width as TensorRT-RTX's compiler makes them for a call of fixed sizes.

The builder needs no GPU, and says the final kernels to a verbose logger.
"""

from __future__ import annotations

import re

import onnx
import onnx_ir as ir

from tests.support.quantized_graphs import weight_dtypes
from tests.support.sparse_checkpoint import FULL_CONFIG
from twotower_contract.config import ModelConfig
from twotower_contract.layout import ROW_LISTS
from twotower_contract.traffic import read_listings, traffic_of
from twotower_engines.building.flavours.flavour import Order
from twotower_engines.building.flavours.gpu_graph import gpu_graph
from twotower_engines.building.flavours.jobs import engine_job, engine_recipe
from twotower_engines.building.flavours.process import build_engine_files
from twotower_engines.building.flavours.profiles import Profile, Sizes
from twotower_engines.building.flavours.tensorrt_rtx import CAPTURE, LIBRARY
from twotower_export.graph import build_context_graph, build_denoiser_graph
from twotower_export.graph.layers import FLOAT_WEIGHTS

KEPT = re.compile("weight|bias|table|_state|_cache")
"""In the names of a graph's weights and states."""

TOWERS = {"context": (build_context_graph, "tokens"), "denoiser": (build_denoiser_graph, "block")}


def config_of(pattern=None):
    """The released model, or one of its width with other layers."""
    values = {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern or "")}
    return ModelConfig.from_json(FULL_CONFIG | (values if pattern else {}))


def write_graph(folder, tower, pattern=None, format_=None):
    """Write a tower's bfloat16 graph, with its matrices in a format; returns its path."""
    config = config_of(pattern)
    stored = weight_dtypes(config, tower, format_, FLOAT_WEIGHTS)
    path = folder / f"{tower}.onnx"
    onnx.save(ir.to_proto(TOWERS[tower][0](config, "bfloat16", stored, {}, 64)), path)
    return path


def compiled(
    folder,
    tower,
    rows,
    tokens,
    context,
    pattern=None,
    capability="12.0",
    format_=None,
    is_cut=False,
    lists=(),
):
    """Compile a tower for calls of one size; returns the listing of its kernels.

    `lists` has the lists of rows that name all of them; the others are empty.
    """
    sizes = {"batch": rows, TOWERS[tower][1]: tokens, "context": context}
    sizes |= {dim: rows if name in lists else 0 for name, dim in ROW_LISTS.items()}
    graph = write_graph(folder, tower, pattern, format_)
    if is_cut:
        # here, for the tests of the kernels choose how these are run before they are imported
        from tests.support.cut import cut_at_plugins

        cut, _ = cut_at_plugins(gpu_graph(onnx.load(graph), has_kernels=True), TOWERS[tower][1])
        onnx.save(cut, graph)
        sizes["flat"] = rows * tokens
        sizes["pairs"] = rows * tokens * config_of().num_experts_per_tok
    return compile_graph(graph, sizes, capability)


def copies(listing):
    """Kernels that copy a weight or a state. A cut graph has other inputs, which plugins make."""
    return [one for one in traffic_of(listing).copies if KEPT.search(one[1])]


def compile_graph(graph, sizes, capability):
    """Compile a graph for calls of one size; returns the listing of its kernels."""
    profile = Profile("fixed", {dim: Sizes(size, size, size) for dim, size in sizes.items()})
    recipe = engine_recipe([profile]) | {"compute_capabilities": [capability]}
    recipe["flags"] = {**recipe["flags"], **CAPTURE}
    job = engine_job(Order(graph, graph.with_suffix(".plan"), recipe))
    build_engine_files(LIBRARY, {graph.stem: job}, 1, lambda name, text: None)
    _, (listing,) = read_listings(graph.with_suffix(".traffic.json"))
    return listing
