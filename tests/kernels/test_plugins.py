"""The plugin definitions under TensorRT's own registration, validation and parser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxruntime import OrtValue

from tests.support import ROOT
from tests.support.kernel_inputs import (
    MASK,
    block,
    draw_experts,
    draw_mamba,
    draw_router,
    layer_of_experts,
    mixed_rows,
    row_tensors,
)
from tests.support.quantized_graphs import weight_dtypes
from twotower_contract.layout import graph_weights
from twotower_engines.errors import BuildError
from twotower_engines.kernels.node import NAMESPACE, Node
from twotower_engines.kernels.nodes import NODES, OPS, STATES
from twotower_engines.kernels.plugin_graph import DECODERS, OPSET, take_codes, with_plugins
from twotower_export.graph import build_context_graph, build_denoiser_graph
from twotower_export.graph.experts import router, sparse_experts
from twotower_export.graph.mamba import mamba_block_step
from twotower_export.graph.refine import refine_block
from twotower_export.tiny.checkpoints import tiny_config

CHECKS = "tests.support.tensorrt_checks"
FLOAT = ir.DataType.FLOAT
EXPORTED = ("RefineBlock", "Router", "SparseExperts", "MambaBlockStep")
"""Ops that a model here has. The experts' other forms are the same nodes with other banks."""


@pytest.fixture(scope="module")
def tensorrt(
    tensorrt_environment: dict[str, str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one of `tests.support.tensorrt_checks` in a process of its own."""
    environment = {k: v for k, v in tensorrt_environment.items() if k != "TRITON_INTERPRET"}

    def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", CHECKS, *args]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


@pytest.fixture(scope="module")
def check(tensorrt: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., Any]:
    """What a check prints; it must end well."""

    def run(*args: str | Path) -> Any:
        done = tensorrt(*args)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])  # TensorRT logs on stdout too

    return run


def op_model(op: str) -> tuple[onnx.ModelProto, list[torch.Tensor]]:
    """A graph that calls the op from inside a function, as a bundle's graphs do, and its inputs."""
    generator = np.random.default_rng(1)
    if op == "RefineBlock":
        logits = torch.from_numpy(generator.normal(0, 3, (5, 8, 272))).float()
        ids = torch.from_numpy(block(generator, 5, 8, 272, 0.8).astype(np.int32))
        given = [logits, ids, *row_tensors(mixed_rows(generator, 5, 8))]
        function = refine_block(MASK, FLOAT)
    elif op == "SparseExperts":
        given = layer_of_experts(draw_experts(generator, 12, 2, 5, 40, 24), 3, generator)
        sizes = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        config = tiny_config("E", hidden=40, **sizes)
        function = sparse_experts(config, FLOAT, is_flat=True, is_gated=True)
    elif op == "Router":
        given = draw_router(generator, [4, 2], 4, 5, 40)
        function = router(tiny_config("E", hidden=40, num_experts=5, num_experts_per_tok=2), FLOAT)
    else:
        given = draw_mamba(generator, 16, [16, 16], sizes=(4, 8, 16, 2))
        sizes = {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16}
        function = mamba_block_step(tiny_config("M", **sizes), FLOAT)
    return wrapped(function, given), given


def wrapped(function: ir.Function, given: list[torch.Tensor]) -> onnx.ModelProto:
    """main -> Wrapper -> the op -> its body: the op is called from inside a function."""
    proto = ir.to_proto(function)
    helper = onnx.helper
    call = helper.make_node(function.name, proto.input, proto.output, domain="twotower")
    call.attribute.extend(proto.attribute_proto)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("twotower", 1)]
    wrapper = helper.make_function(
        "twotower", "Wrapper", list(proto.input), list(proto.output), [call], opsets
    )
    types = {torch.float32: onnx.TensorProto.FLOAT, torch.int32: onnx.TensorProto.INT32}
    names = OPS[function.name].inputs
    inputs = [
        helper.make_tensor_value_info(name, types[tensor.dtype], tensor.shape)
        for name, tensor in zip(names, given, strict=True)
    ]
    integers = ("new_ids", "committed", "still_masked", "indices")
    outputs = [
        helper.make_tensor_value_info(
            name, onnx.TensorProto.INT32 if name in integers else onnx.TensorProto.FLOAT, []
        )
        for name in OPS[function.name].outputs
    ]
    node = helper.make_node(
        "Wrapper", [i.name for i in inputs], [o.name for o in outputs], domain="twotower"
    )
    graph = helper.make_graph([node], function.name, inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, functions=[wrapper, proto], ir_version=10)


def run(model: onnx.ModelProto, given: list[torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))


def chain_of(op: str) -> tuple[Node, ...]:
    """An op's chain in a graph that wants all of its outputs."""
    return OPS.get(f"{op}{STATES}", OPS[op]).chain


@pytest.mark.parametrize("op", EXPORTED)
def test_the_graph_with_plugins_means_the_same(op: str) -> None:
    model, given = op_model(op)
    before = model.SerializeToString()
    changed = with_plugins(model)
    assert model.SerializeToString() == before, "the bundle's graph was changed"
    onnx.checker.check_model(changed)
    called = [node.op_type for node in changed.graph.node if node.domain == NAMESPACE]
    assert called == [node.name for node in chain_of(op)]
    for mine, theirs in zip(run(changed, given), run(model, given), strict=True):
        np.testing.assert_array_equal(mine, theirs)


TOWERS = {"denoiser": build_denoiser_graph, "context": build_context_graph}


@pytest.mark.parametrize("tower", TOWERS)
def test_a_whole_tower_with_plugins_means_the_same(tower: Literal["denoiser", "context"]) -> None:
    """Every op of every layer is found, however deep inside functions; nothing else changes."""
    config = tiny_config("ME*ME", hidden=16)
    dtypes = dict.fromkeys(graph_weights(config, tower), "F32")
    model = ir.to_proto(TOWERS[tower](config, "float32", dtypes, {}))
    changed = with_plugins(model)
    is_denoiser = tower == "denoiser"
    mamba = "MambaBlockStep" if is_denoiser else f"MambaBlockStep{STATES}"
    chains = {mamba: 2, "Router": 2, "SparseExperts": 2, "RefineBlock": int(is_denoiser)}
    counts = Counter(node.op_type for node in changed.graph.node if node.domain == "twotower")
    assert counts == {node.name: n for op, n in chains.items() for node in OPS[op].chain if n}

    given = random_inputs(model, {"batch": 2, "block": 4, "tokens": 4, "context": 3 + 4})
    for mine, theirs in zip(run(changed, given), run(model, given), strict=True):
        assert not np.isnan(theirs).any()
        np.testing.assert_array_equal(mine, theirs)


CODES = {"fp8": onnx.TensorProto.FLOAT8E4M3FN, "int4": onnx.TensorProto.INT32}
CODES["nvfp4"] = CODES["int4"]


@pytest.mark.parametrize("form", CODES)
def test_quantized_weights_are_taken_as_codes(form: str) -> None:
    """Our kernels read the codes; the ops' functions would get weights written out in T."""
    config = tiny_config("EM*E", hidden=64)
    stored = weight_dtypes(config, "denoiser", form).items()
    dtypes = {name: "F32" if dtype == "BF16" else dtype for name, dtype in stored}
    model = ir.to_proto(build_denoiser_graph(config, "float32", dtypes, {}, 16))
    changed = with_plugins(model)
    onnx.checker.check_model(changed)
    suffix = form.upper()
    called = [node.op_type for node in changed.graph.node if node.domain == NAMESPACE]
    assert [one for one in called if one.startswith("Experts")] == [
        node.name for node in OPS[f"SparseExperts{suffix}"].chain
    ] * 2
    # both of each shared expert; the Mamba layer before attention stays as it is
    assert called.count(f"Product{suffix}") == (0 if form == "fp8" else 4)
    up = next(node for node in changed.graph.node if node.op_type == f"ExpertsUp{suffix}")
    inputs = {value.name: value.type.tensor_type for value in model.graph.input}
    assert inputs[up.input[1]].elem_type == CODES[form]
    experts = [i for i in inputs if ".experts." in i and "_scale" not in i]
    made = {name for node in changed.graph.node if node.domain == "" for name in node.input}
    assert len(experts) == 4
    assert not made & set(experts), "still decoded outside of a kernel"

    generator = np.random.default_rng(2)
    given = {}
    sizes = {"batch": 2, "block": 4, "context": 8}
    for value, plain in zip(model.graph.input, random_inputs(model, sizes), strict=True):
        array, kind = plain.numpy(), value.type.tensor_type.elem_type
        is_codes = value.name in dict(stored) and kind == CODES[form]
        if is_codes or (form == "nvfp4" and value.name.endswith("_scale")):
            size = (*array.shape, 1 if form == "fp8" else 4)
            codes = generator.integers(0, 0x60, size).astype(np.uint8)
            array = codes[..., 0] if form == "fp8" else codes.view(np.int32)[..., 0]
            given[value.name] = OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
        else:
            is_scale = "_scale" in value.name and value.name.startswith("denoiser_tower")
            array = np.asarray(np.abs(array) / 50 if is_scale else array, array.dtype)
            given[value.name] = OrtValue.ortvalue_from_numpy(array)
    # ONNX Runtime takes no FP8 in a function that ignores it, as the first plugins' functions do.
    ops = [(NAMESPACE, op) for op in (*OPS, *DECODERS.values())]
    taken = onnx.inliner.inline_selected_functions(model, ops, exclude=True)
    take_codes(taken)
    assert f"SparseExperts{suffix}" in {node.op_type for node in taken.graph.node}
    answers = []
    for one in (taken, model) if form == "fp8" else (changed, model):
        session = onnxruntime.InferenceSession(one.SerializeToString())
        answers.append([v.numpy() for v in session.run_with_ort_values(None, given)])
    for mine, theirs in zip(*answers, strict=True):
        assert not np.isnan(theirs).any()
        np.testing.assert_array_equal(mine, theirs)


def test_codes_that_no_kernel_takes_are_refused() -> None:
    config = tiny_config("E", hidden=64)
    dtypes = {
        name: "I32" if name.endswith("up_proj.weight") else "F32"
        for name in graph_weights(config, "context")
    }
    model = ir.to_proto(build_context_graph(config, "float32", dtypes, {}, 16))
    (decoding,) = [node for node in model.graph.node if node.op_type == "FromINT4"]
    model.graph.node.append(onnx.helper.make_node("Identity", decoding.output, ["elsewhere"]))
    with pytest.raises(BuildError, match=r"weights of 4 bits \(context_tower.*go where no kernel"):
        with_plugins(model)


def random_inputs(model: onnx.ModelProto, sizes: dict[str, int]) -> list[torch.Tensor]:
    """Plausible values for every input of a tower's graph."""
    generator = np.random.default_rng(2)
    integers = {"ids": MASK, "lengths": 4, "context_lengths": 3, "steps_left": 3}
    made = []
    for value in model.graph.input:
        kind = value.type.tensor_type
        dims = [dim.dim_value or sizes[dim.dim_param] for dim in kind.shape.dim]
        if kind.elem_type == onnx.TensorProto.INT32:
            made.append(torch.full(dims, integers.get(value.name, 1), dtype=torch.int32))
        else:
            made.append(torch.from_numpy(generator.normal(0, 0.3, dims)).float())
    return made


def test_new_states_are_asked_for_where_the_graph_returns_them() -> None:
    model, _ = op_model("MambaBlockStep")
    for op in (f"MambaBlockStep{STATES}", "MambaBlockStep"):
        called = [node.op_type for node in with_plugins(model).graph.node]
        assert called == [node.name for node in OPS[op].chain]
        del model.graph.output[1:]


def test_a_graph_without_ops_is_refused() -> None:
    model, _ = op_model("RefineBlock")
    del model.graph.node[:]
    with pytest.raises(BuildError, match="calls none of RefineBlock"):
        with_plugins(model)


def test_tensorrt_registers_and_validates_every_definition(check: Callable[..., Any]) -> None:
    found = check("registered")
    assert found["before"] == {}
    assert sorted(found["after"]) == sorted(NODES)
    for node in NODES.values():
        assert sorted(found["after"][node.name]) == sorted(node.attributes)
    assert "registered its plugins for 9.0" in found["refusal"]


def test_tensorrt_instantiates_ahead_of_time_plugins(check: Callable[..., Any]) -> None:
    assert check("shapes_unknown") == {
        "RefineVocabulary": ["FLOAT", "INT32"],
        "ExpertsUp": ["BF16"],
        "MambaSpans": ["BF16", "FLOAT", "FLOAT"],
    }


def test_what_tensorrt_is_given(check: Callable[..., Any]) -> None:
    """Arguments in TensorRT's order - inputs, integers, outputs - and the launch."""
    made = check("implementations")
    vocabulary = made["RefineVocabulary"]
    assert vocabulary["outputs"] == [["FLOAT", [2, 16, 5, 2]], ["INT32", [2, 16, 2]]]
    assert vocabulary["launch"][:4] == [2, 16, 2, 128]
    assert vocabulary["integers"] == [16, 4]
    assert kinds(vocabulary) == "ppppppiipp"

    up = made["ExpertsUp"]
    assert up["outputs"] == [["BF16", [80, 96]]]
    assert up["launch"][:4] == [2, min(80, 80 // 16 + 8), 1, 128]
    assert up["integers"] == [80]
    assert kinds(up) == "ppppppip"  # the sixth input, `indices`, is passed and ignored
    assert "experts_up_ignored_5" in up["ptx"]

    spans = made["MambaSpans"]  # 200 tokens of 3 rows: two spans of 128, and a slot too many
    assert spans["outputs"] == [
        ["BF16", [3, 200, 96]],
        *[["FLOAT", [4, 4, 8, 16]], ["FLOAT", [4, 4]]],
    ]
    assert spans["launch"][:4] == [4, 3, 2, 128]
    assert spans["integers"] == [200, 128]
    assert kinds(spans) == "p" * 10 + "ii" + "ppp"
    for node in made.values():
        assert node["launch"][4] <= 48 * 1024
        assert f".visible .entry {node['entry']}(" in node["ptx"]


def kinds(node: dict[str, Any]) -> str:
    """p for each pointer and i for each integer among an entry's parameters."""
    found = re.search(r"\.entry \w+\((.*?)\n\)", node["ptx"], re.DOTALL)
    assert found
    lines = found.group(1).strip().splitlines()
    return "".join("i" if ".u32" in line else "p" for line in lines)


def test_a_plugin_keeps_one_kernel_for_all_profiles(check: Callable[..., Any]) -> None:
    """NVIDIA's class knows a kernel by types, formats and tactic alone: the profile is not asked.

    So a tactic's kernel must be the same in every profile, and its grid that of its own tiles.
    """
    made = check("profiles")
    for op in (*EXPORTED, f"MambaBlockStep{STATES}", "SparseExpertsNVFP4", "LinearNVFP4"):
        for node in OPS[op].chain:
            found = made[node.name]
            assert all(found["same"]), node.name
            assert len(found["same"]) == found["kernels"] == node.tactics, node.name
    few, deep, many = made["ExpertsUp"]["grids"].values()
    assert few == deep != many


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One graph per op with its plugin nodes, on disk."""
    folder = tmp_path_factory.mktemp("graphs")
    for op in EXPORTED:
        onnx.save(with_plugins(op_model(op)[0]), folder / f"{op}.onnx")
    return {op: folder / f"{op}.onnx" for op in EXPORTED}


def test_the_parser_takes_the_function_where_no_plugin_is(
    check: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    for made in check("functions", *graphs.values()):
        assert made["parsed"], made["errors"]
        assert len(made["layers"]) > 10, "the op's body, in ordinary layers"
        assert not [layer for layer in made["layers"] if "PLUGIN" in layer]
    assert check("built", graphs["SparseExperts"])["bytes"] > 0


def test_the_parser_takes_the_plugin_where_it_is_registered(
    check: Callable[..., Any], graphs: dict[str, Path]
) -> None:
    """As far as it goes here: RTX's parser finds our plugin, and takes another kind only."""
    for made in check("quick_plugins", *graphs.values()):
        assert not made["parsed"]
        assert "IPluginCreatorV3One creator only" in made["errors"][0]


@pytest.mark.parametrize("op", EXPORTED)
def test_the_parser_asks_a_plugin_of_that_name(
    op: str, tensorrt: Callable[..., subprocess.CompletedProcess[str]], graphs: dict[str, Path]
) -> None:
    """With plugins of the kind that RTX takes under our names: the chain's first is asked for.

    The library then ends the process, as it does with every plugin layer without a GPU.
    """
    done = tensorrt("other_plugins", graphs[op])
    asked = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"plugin"')]
    first = chain_of(op)[0]
    assert [one["plugin"] for one in asked] == [first.name], done.stderr[-2000:]
    expected = {"mask_id": [MASK], "num_experts": [5], "n_groups": [2]}
    assert asked[0]["attributes"] == {name: expected[name] for name in first.attributes}
