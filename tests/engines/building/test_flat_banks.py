"""Banks of experts as one matrix: the same answers, and no bank that a call transposes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.support import host_device as host
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from twotower_contract.layout import BANKS, FLAT, expected_tensors, graph_weights
from twotower_engines.artifacts.engine_interface import interface_of
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.building.flavours.flat_banks import with_flat_banks
from twotower_engines.runtime.resident.upload import upload_weights
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.graph import build_context_graph
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("EE", hidden=32, dtype="float32")


def context_graph(dtype):
    """A context graph of two layers of experts, whose banks are stored in a dtype."""
    dtypes = dict.fromkeys(graph_weights(CONFIG, "context"), "F32")
    dtypes |= {name: dtype for name in dtypes if name.endswith(BANKS)}
    return ir.to_proto(build_context_graph(CONFIG, "float32", dtypes, {}))


def random_inputs(graph):
    """Values of every input of a graph, for 3 rows of 5 tokens."""
    random, sizes = np.random.default_rng(7), {"batch": 3, "tokens": 5}
    given = {}
    for one in graph.graph.input:
        dims = one.type.tensor_type.shape.dim
        shape = [dim.dim_value or sizes[dim.dim_param] for dim in dims]
        given[one.name] = random.normal(0, 0.3, shape).astype(np.float32)
    given |= {"ids": random.integers(0, 300, (3, 5), np.int32)}
    given |= {"lengths": np.array([5, 2, 0], np.int32), "context_lengths": np.zeros(3, np.int32)}
    return given


def logits(graph, given):
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {one.name for one in session.get_inputs()}
    return session.run(["logits"], {name: x for name, x in given.items() if name in wanted})[0]


def test_a_graph_with_flat_banks_computes_the_same():
    graph = context_graph("F32")
    flat = with_flat_banks(graph)
    given = random_inputs(graph)
    banks = [name for name in given if name.endswith("experts.down_proj")]
    laid = {f"{name}{FLAT}": np.concatenate(list(given[name]), axis=1) for name in banks}
    np.testing.assert_array_equal(logits(graph, given), logits(flat, given | laid))
    assert len(banks) == 2
    assert not {one.name for one in flat.graph.input} & set(banks)
    (body,) = (one for one in flat.functions if one.name == "SparseExperts")
    assert not [node for node in body.node if node.input[:1] == ["down"] and "T" in node.op_type]
    assert {one.name for one in graph.graph.input} >= set(banks), "the graph itself is as it was"


@pytest.mark.parametrize("stored", ["F8_E4M3"])
def test_quantized_banks_stay_banks(stored):
    """TensorRT would write them out in T, were they one matrix."""
    graph = context_graph(stored)
    assert with_flat_banks(graph) is graph


@pytest.mark.parametrize("window", [1000, 4096, 1 << 20])
def test_a_bank_is_laid_out_on_its_way(tmp_path, window):
    """Windows begin and end anywhere in a row."""
    tensors = random_tensors(CONFIG, float32=tuple(expected_tensors(CONFIG)))
    source = write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors)
    manifest = write_bundle(open_checkpoint(source), tmp_path / "bundle")
    graph = onnx.load(tmp_path / "bundle" / manifest.graph("native", "context").file)
    inputs = [one.name for one in with_flat_banks(graph).graph.input]
    interface = interface_of(manifest, "context", inputs=inputs)
    assert set(inputs) == set(interface.inputs)
    store, device = WeightStore(manifest), host.HostDevice()  # which holds the memory
    addresses = upload_weights(store, "context", device, window=window, inputs=inputs)
    for weight in manifest.weights["context"].values():
        is_bank = weight.name.endswith("experts.down_proj")
        name = weight.name + FLAT if is_bank else weight.name
        shape = interface.inputs[name].shape
        there = host.view(addresses[name], 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        wanted = store.float32(weight)
        np.testing.assert_array_equal(
            there, np.concatenate(list(wanted), axis=1) if is_bank else wanted
        )
