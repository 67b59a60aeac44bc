"""The ONNX graphs against the PyTorch towers, which somebody else wrote from the same rules.

fp32, random models of odd shapes, ragged rows, an inactive row, an empty and a full context.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from twotower_contract.layout import graph_weights
from twotower_export.graph import build_context_graph, build_denoiser_graph
from twotower_export.graph.body import Body, in_section, inputs
from twotower_export.graph.layers import FLOAT_WEIGHTS
from twotower_export.reference.towers import ContextTower, Denoiser, advance_states
from twotower_export.tiny.checkpoints import random_tensors, tiny_config

TOLERANCE = 1e-4
LONGEST = 37
TOKENS = 9
CAPACITY = LONGEST + TOKENS
SEED = 11  # of all that is drawn
MODELS = 8


def drawn_config(number):
    """A random configuration: layers and sizes that divide nothing they need not."""
    draw = random.Random(f"graph {SEED}.{number}")
    groups, kv, experts = draw.randint(1, 3), draw.randint(1, 3), draw.randint(2, 9)
    return tiny_config(
        "".join(draw.choices("ME*", k=draw.randint(1, 8))),
        draw.randint(8, 40),
        "float32",
        n_groups=groups,
        mamba_num_heads=groups * draw.randint(1, 4),
        mamba_head_dim=draw.randint(2, 9),
        ssm_state_size=draw.randint(3, 17),
        num_key_value_heads=kv,
        num_attention_heads=kv * draw.randint(1, 3),
        head_dim=draw.randint(3, 17),
        num_experts=experts,
        num_experts_per_tok=draw.randint(1, experts),
        norm_topk_prob=draw.random() < 0.7,
    )


CONFIGS = [drawn_config(number) for number in range(MODELS)]
WITH_ATTENTION = [number for number in range(MODELS) if "*" in CONFIGS[number].pattern][:3]
WITH_MAMBA = [number for number in range(MODELS) if "M" in CONFIGS[number].pattern][:3]


def weights_of(config, tower, tensors):
    """The graph's weight inputs from checkpoint tensors, float32."""
    made = {}
    for name, source in graph_weights(config, tower).items():
        parts = [tensors[part].numpy() for part in source.sources]
        array = np.stack(parts) if source.how == "stack" else parts[0]
        made[name] = array.squeeze(1) if source.how == "squeeze" else array
        assert made[name].shape == tuple(source.shape), name
    return made


def session(model: ir.Model) -> ort.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options)


def random_states(config, batch, generator):
    def draw(*shape):
        return generator.standard_normal(shape).astype(np.float32)

    states = {}
    for index, kind in enumerate(config.pattern):
        name = f"context.layers.{index}."
        if kind == "M":
            states[name + "conv_state"] = draw(batch, 3, config.conv_dim)
            sizes = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
            states[name + "ssm_state"] = 30 * draw(batch, *sizes)
        if kind == "*":
            for part in ("k_cache", "v_cache"):
                shape = (batch, config.num_key_value_heads, CAPACITY, config.head_dim)
                states[name + part] = draw(*shape)
    return states


def loaded(module, tensors):
    own = module.state_dict()
    module.load_state_dict({n: t.reshape(own[n].shape) for n, t in tensors.items() if n in own})
    return module.eval()


def difference(ours, theirs):
    """The largest difference, as a share of the largest value."""
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.fixture(params=range(MODELS), ids=lambda number: CONFIGS[number].pattern)
def model(request):
    return CONFIGS[request.param], random_tensors(CONFIGS[request.param], seed=request.param)


def test_the_drawn_models_have_every_mix_of_layers():
    mixes = {frozenset(config.pattern) for config in CONFIGS}
    assert {frozenset(mix) for mix in ("M", "E", "*", "ME*")} <= mixes


ROWS = {"lengths": [9, 1, 0, 5], "context_lengths": [0, LONGEST, 3, 12]}


def test_context_graph_equals_the_pytorch_tower(model):
    config, tensors = model
    generator = np.random.default_rng(1)
    ids = generator.integers(4, config.vocab_size, (4, 9)).astype(np.int32)
    rows = {name: np.array(values, np.int32) for name, values in ROWS.items()}
    states = random_states(config, 4, generator)
    weights = weights_of(config, "context", tensors)
    graph = build_context_graph(config, "float32", dict.fromkeys(weights, "F32"), {})
    runner = session(graph)
    outputs = [output.name for output in runner.get_outputs()]
    got = runner.run(outputs, {"ids": ids, **rows, **states, **weights})

    tower = loaded(ContextTower(config), tensors)
    given = {name: torch.from_numpy(value) for name, value in states.items()}
    with torch.no_grad():
        order = [torch.from_numpy(rows[name]) for name in ROWS]
        logits, new = tower(torch.from_numpy(ids), *order, given)
    after = advance_states(given, new, *order)
    expected = {"logits": logits, **{f"{name}_new": value for name, value in after.items()}}
    made = dict(zip(outputs, got, strict=True))
    queries = {name for name in made if name.endswith("queries")}
    assert made.keys() - queries == expected.keys()
    active = rows["lengths"] > 0
    for name, value in made.items():
        if name in queries:
            continue
        theirs = expected[name].numpy()
        if name.endswith("cache_new"):  # what is written past a row's length is nobody's
            for row, (length, start) in enumerate(zip(*rows.values(), strict=True)):
                value[row, :, start + length : start + TOKENS] = 0
                theirs[row, :, start + length : start + TOKENS] = 0
        if name == "logits":
            value, theirs = value[active], theirs[active]
        assert difference(value, theirs) < TOLERANCE, name


@pytest.mark.parametrize("model", WITH_MAMBA, indirect=True)
def test_an_inactive_row_keeps_its_states(model):
    config, tensors = model
    generator = np.random.default_rng(2)
    states = random_states(config, 2, generator)
    weights = weights_of(config, "context", tensors)
    runner = session(build_context_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    feed = {
        "ids": np.full((2, 4), 5, np.int32),
        "lengths": np.array([4, 0], np.int32),
        "context_lengths": np.array([2, 2], np.int32),
    }
    outputs = [o.name for o in runner.get_outputs() if "state_new" in o.name]
    for name, value in zip(
        outputs, runner.run(outputs, {**feed, **states, **weights}), strict=True
    ):
        before = states[name.removesuffix("_new")]
        np.testing.assert_array_equal(value[1], before[1])
        assert not np.array_equal(value[0], before[0])


def test_states_are_exact_however_fast_they_decay():
    """Long calls of several rows with large steps: the end of the decay must cancel itself."""
    config = tiny_config("M", 32, "float32")
    tensors = random_tensors(config, seed=9)
    for name, tensor in tensors.items():
        if name.endswith("dt_bias"):
            tensor += 6.0
    generator = np.random.default_rng(9)
    ids = generator.integers(4, config.vocab_size, (3, 200)).astype(np.int32)
    rows = {"lengths": np.array([200, 64, 199], np.int32), "context_lengths": np.zeros(3, np.int32)}
    states = random_states(config, 3, generator)
    weights = weights_of(config, "context", tensors)
    runner = session(build_context_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    name = "context.layers.0.ssm_state_new"
    (got,) = runner.run([name], {"ids": ids, **rows, **states, **weights})

    tower = loaded(ContextTower(config), tensors).double()
    given = {name: torch.from_numpy(value).double() for name, value in states.items()}
    order = (torch.from_numpy(rows[name]) for name in ROWS)
    with torch.no_grad():
        _, new = tower(torch.from_numpy(ids), *order, given)
    assert difference(got, new[name].numpy()) < TOLERANCE / 3


@pytest.mark.parametrize("rounding", ["float32", "bfloat16"])
def test_denoiser_graph_equals_the_pytorch_tower(model, rounding):
    config, tensors = model
    config = replace(config, dtype=rounding)
    generator = np.random.default_rng(3)
    ids = generator.integers(4, config.vocab_size, (4, 9)).astype(np.int32)
    ids[generator.random(ids.shape) < 0.6] = config.mask_token_id
    states = random_states(config, 4, generator)
    weights = weights_of(config, "denoiser", tensors)
    runner = session(build_denoiser_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    feed = {
        "ids": ids,
        **{name: np.array(values, np.int32) for name, values in ROWS.items()},
        "conditioned": np.ones(4, np.int32),
        "steps_left": np.array([4, 1, 3, 2], np.int32),
        "policy": np.zeros(4, np.int32),
        "seed": np.zeros(4, np.int32),
        "threshold": np.full(4, 0.5, np.float32),
        "temperature": np.zeros(4, np.float32),
    }
    (logits,) = runner.run(["logits"], {**feed, **states, **weights})

    tower = loaded(Denoiser(config), tensors)
    tower.time_rounding = getattr(torch, rounding)
    with torch.no_grad():
        expected = tower(
            *(torch.from_numpy(feed[n]) for n in ("ids", *ROWS, "conditioned")),
            {name: torch.from_numpy(value) for name, value in states.items()},
        ).numpy()
    for row, length in enumerate(ROWS["lengths"]):
        if length:
            assert difference(logits[row, :length], expected[row, :length]) < TOLERANCE


DENOISER_ROWS = {
    "conditioned": np.ones(2, np.int32),
    "steps_left": np.full(2, 3, np.int32),
    "policy": np.zeros(2, np.int32),
    "seed": np.zeros(2, np.int32),
    "threshold": np.full(2, 0.5, np.float32),
    "temperature": np.zeros(2, np.float32),
}


@pytest.mark.parametrize("model", WITH_ATTENTION, indirect=True)
def test_a_denoise_step_writes_only_into_the_room_at_the_end_of_a_cache(model):
    """The context's keys and values are read again, by the next step and the next request."""
    config, tensors = model
    generator = np.random.default_rng(8)
    states = random_states(config, 2, generator)
    weights = weights_of(config, "denoiser", tensors)
    runner = session(build_denoiser_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    feed = {
        "ids": np.full((2, 5), config.mask_token_id, np.int32),
        "lengths": np.array([5, 0], np.int32),
        "context_lengths": np.array([CAPACITY - 5, 7], np.int32),
        **DENOISER_ROWS,
    }
    names = [one.name for one in runner.get_outputs() if one.name.endswith("cache_new")]
    assert len(names) == 2 * config.pattern.count("*")
    for name, value in zip(names, runner.run(names, {**feed, **states, **weights}), strict=True):
        before = states[name.removesuffix("_new")]
        np.testing.assert_array_equal(value[:, :, :-5], before[:, :, :-5])
        assert not (value[:, :, -5:] == before[:, :, -5:]).any()


def test_caches_are_updated_where_they_lie():
    """ONNX Runtime writes only the call's tokens where input and output are one buffer."""
    config = tiny_config("*", 32, "float32")
    weights = weights_of(config, "context", random_tensors(config, seed=1))
    runner = session(build_context_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    states = random_states(config, 1, np.random.default_rng(5))
    ids, lengths = np.full((1, 4), 7, np.int32), {"lengths": [4], "context_lengths": [3]}
    feed = {"ids": ids, **{name: np.array(size, np.int32) for name, size in lengths.items()}}
    expected = runner.run([f"{name}_new" for name in states], {**feed, **states, **weights})
    io, of = runner.io_binding(), ort.OrtValue.ortvalue_from_numpy
    for name, array in {**feed, **states, **weights}.items():
        io.bind_ortvalue_input(name, of(array))
    for name, array in states.items():
        array[:, :, 3:] = 0
        io.bind_ortvalue_output(f"{name}_new", of(array))
    runner.run_with_iobinding(io)
    for array, value in zip(states.values(), expected, strict=True):
        np.testing.assert_array_equal(array[:, :, :7], value[:, :, :7])
        assert not array[:, :, 7:].any()


@pytest.mark.parametrize("build", [build_context_graph, build_denoiser_graph])
@pytest.mark.parametrize("rubbish", [-1e4, 1e4])
def test_what_a_cache_holds_past_its_context_changes_nothing(build, rubbish):
    """Leftovers of another request, all finite; the second row is given no token at all."""
    config = tiny_config("*ME*", 32, "float32")
    tower = "context" if build is build_context_graph else "denoiser"
    weights = weights_of(config, tower, random_tensors(config, seed=1))
    runner = session(build(config, "float32", dict.fromkeys(weights, "F32"), {}))
    lengths = {"lengths": [4, 0], "context_lengths": [3, 0]}
    feed = {"ids": np.full((2, 5), config.mask_token_id, np.int32)}
    feed |= {name: np.array(values, np.int32) for name, values in lengths.items()}
    feed |= DENOISER_ROWS if tower == "denoiser" else {}
    states = random_states(config, 2, np.random.default_rng(5))

    def run(past):
        for name, state in states.items():
            if name.endswith("_cache"):
                state[0, :, 3:] = state[1] = past
        names = [one.name for one in runner.get_outputs() if "cache" not in one.name]
        return dict(zip(names, runner.run(names, {**feed, **states, **weights}), strict=True))

    clean, dirty = run(0.0), run(rubbish)
    for name, value in clean.items():
        np.testing.assert_array_equal(value, dirty[name], err_msg=name)
        assert not np.isnan(value).any(), name


def test_a_plain_pass_has_no_time_conditioning(model):
    """One token, conditioned 0: the pass of mock-AR."""
    config, tensors = model
    generator = np.random.default_rng(4)
    states = random_states(config, 1, generator)
    weights = weights_of(config, "denoiser", tensors)
    runner = session(build_denoiser_graph(config, "float32", dict.fromkeys(weights, "F32"), {}))
    one = np.ones(1, np.int32)
    feed = {
        "ids": 7 * one[None],
        "lengths": one,
        "context_lengths": 4 * one,
        "conditioned": 0 * one,
        "steps_left": one,
        "policy": 0 * one,
        "seed": 0 * one,
        "threshold": one.astype(np.float32),
        "temperature": 0 * one.astype(np.float32),
    }
    (plain,) = runner.run(["logits"], {**feed, **states, **weights})
    changed = {n: w + 1.0 if n.startswith(("t_", "scale_")) else w for n, w in weights.items()}
    (same,) = runner.run(["logits"], {**feed, **states, **changed})
    np.testing.assert_array_equal(plain, same)
    conditioned = feed | {"conditioned": one}
    (other,) = runner.run(["logits"], {**conditioned, **states, **weights})
    assert np.abs(plain - other).max() > 1e-3


def test_a_graph_reads_as_an_architecture():
    config = tiny_config("MEM*EM*E", 32, "bfloat16")
    weights = graph_weights(config, "denoiser")
    stored = {name: "F32" if name.endswith(FLOAT_WEIGHTS) else "BF16" for name in weights}
    graph = build_denoiser_graph(config, "bfloat16", stored, {"checkpoint": "tiny"})
    layers = [node for node in graph.graph if node.op_type.endswith("Layer")]
    assert [node.name for node in layers] == [f"denoiser.layers.{i}" for i in range(8)]
    assert [node.op_type for node in layers][:3] == [
        "DenoiserMambaLayer",
        "DenoiserExpertsLayer",
        "DenoiserMambaLayer",
    ]
    assert len(graph.graph) < 30
    assert graph.metadata_props["checkpoint"] == "tiny"
    assert {"RefineBlock", "SparseExperts", "MambaBlockStep"} <= {
        function.name for function in graph.functions.values()
    }
    assert all(function.doc_string for function in graph.functions.values())
    onnx.checker.check_model(ir.to_proto(graph))


@pytest.fixture(params=["context", "denoiser"])
def graph(request):
    config = tiny_config("MEM*EM*E", 32, "bfloat16")
    weights = graph_weights(config, request.param)
    stored = {name: "F32" if name.endswith(FLOAT_WEIGHTS) else "BF16" for name in weights}
    build = {"context": build_context_graph, "denoiser": build_denoiser_graph}[request.param]
    return ir.to_proto(build(config, "float32", stored, {}))


def test_inputs_and_outputs_say_their_shape_and_meaning(graph):
    for value in (*graph.graph.input, *graph.graph.output):
        sizes = [dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        shape, _, meaning = value.doc_string.partition("] ")
        assert shape == f"[{', '.join(sizes)}", value.name
        dtype, _, meaning = meaning.partition(". ")
        assert dtype == onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
        assert len(meaning) > 10, value.name


def test_node_names_say_where_a_node_belongs(graph):
    names = [node.name for node in graph.graph.node]
    for function in graph.functions:
        inside = [node.name for node in function.node]
        assert all(name.startswith(f"{function.name}/") for name in inside)
        names += inside
    assert len(names) == len(set(names))
    assert {"MambaBlockStep/decay.exp", "Router/scores.sigmoid"} <= set(names)
    tower = graph.graph.name
    assert {f"{tower}/embeddings.gather", f"{tower}.layers.3", f"{tower}/head.gemm"} <= set(names)


def test_a_node_more_renames_none_in_another_section():
    @in_section("part")
    def part(b, x):
        b.begin("inner")
        return b.op.Exp(x)

    def names(extra):
        b = Body(ir.DataType.FLOAT)
        given = inputs("x")
        (x,) = given
        b.begin("first")
        for _ in range(extra):
            x = b.op.Exp(x)
        b.begin("second")
        x = part(b, b.op.Mul(b.op.Exp(x), b.f32(2.0)))
        x = b.op.Exp(x)
        b.begin("third")
        function = b.function("F", given, {"y": b.op.Neg(b.op.Exp(x))}, "")
        return [node.name for node in function if node.op_type != "Constant"]

    rest = ["second.exp", "second.mul", "second.part.inner.exp", "second.exp_1", "third.exp"]
    rest = [f"F/{name}" for name in [*rest, "third.neg"]]
    assert names(0) == rest
    assert names(2) == ["F/first.exp", "F/first.exp_1", *rest]
