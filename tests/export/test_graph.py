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
from twotower_export.verification.calls import LONGEST, CallShape, random_feed

TOLERANCE = 1e-4
TOKENS = 9
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


def built(config, tower, tensors):
    """A tower's float32 graph in a session, and its weights."""
    weights = weights_of(config, tower, tensors)
    build = {"context": build_context_graph, "denoiser": build_denoiser_graph}[tower]
    return session(build(config, "float32", dict.fromkeys(weights, "F32"), {})), weights


def drawn_call(config, tower, lengths, context_lengths, tokens=TOKENS, conditioned=1):
    """Every input of a call but the weights, and the states among them."""
    flags = (conditioned,) * len(lengths)
    shape = CallShape("", tokens, tuple(lengths), tuple(context_lengths), flags)
    feed = random_feed(config, tower, shape, seed=1)
    return feed, {name: value for name, value in feed.items() if ".layers." in name}


def run(runner, names, *feeds):
    """Outputs of a call by name."""
    given = {name: value for feed in feeds for name, value in feed.items()}
    return dict(zip(names, runner.run(names, given), strict=True))


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


LENGTHS, PAST = [9, 1, 0, 5], [0, LONGEST, 3, 12]


def test_context_graph_equals_the_pytorch_tower(model):
    config, tensors = model
    runner, weights = built(config, "context", tensors)
    feed, states = drawn_call(config, "context", LENGTHS, PAST)
    outputs = [output.name for output in runner.get_outputs() if "queries" not in output.name]
    made = run(runner, outputs, feed, weights)

    tower = loaded(ContextTower(config), tensors)
    given = {name: torch.from_numpy(value) for name, value in states.items()}
    ids, *rows = (torch.from_numpy(feed[n]) for n in ("ids", "lengths", "context_lengths"))
    with torch.no_grad():
        logits, new = tower(ids, *rows, given)
    after = advance_states(given, new, *rows)
    expected = {"logits": logits, **{f"{name}_new": value for name, value in after.items()}}
    assert made.keys() == expected.keys()
    active = feed["lengths"] > 0
    for name, value in made.items():
        theirs = expected[name].numpy()
        if name.endswith("cache_new"):  # what is written past a row's length is nobody's
            for row, (length, start) in enumerate(zip(LENGTHS, PAST, strict=True)):
                value[row, :, start + length : start + TOKENS] = 0
                theirs[row, :, start + length : start + TOKENS] = 0
        if name == "logits":
            value, theirs = value[active], theirs[active]
        assert difference(value, theirs) < TOLERANCE, name


@pytest.mark.parametrize("model", WITH_MAMBA, indirect=True)
def test_an_inactive_row_keeps_its_states(model):
    config, tensors = model
    runner, weights = built(config, "context", tensors)
    feed, states = drawn_call(config, "context", [4, 0], [2, 2], tokens=4)
    outputs = [o.name for o in runner.get_outputs() if "state_new" in o.name]
    for name, value in run(runner, outputs, feed, weights).items():
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
    runner, weights = built(config, "context", tensors)
    feed, _ = drawn_call(config, "context", [200, 64, 199], [0, 0, 0], tokens=200)
    name = "context.layers.0.ssm_state_new"
    got = run(runner, [name], feed, weights)[name]

    tower = loaded(ContextTower(config), tensors).double()
    given = {n: torch.from_numpy(value) for n, value in feed.items()}
    rows = [given[n] for n in ("ids", "lengths", "context_lengths")]
    with torch.no_grad():
        _, new = tower(*rows, {n: value.double() for n, value in given.items()})
    assert difference(got, new[name].numpy()) < TOLERANCE / 3


@pytest.mark.parametrize("rounding", ["float32", "bfloat16"])
def test_denoiser_graph_equals_the_pytorch_tower(model, rounding):
    config, tensors = model
    config = replace(config, dtype=rounding)
    runner, weights = built(config, "denoiser", tensors)
    feed, _ = drawn_call(config, "denoiser", LENGTHS, PAST)
    logits = run(runner, ["logits"], feed, weights)["logits"]

    tower = loaded(Denoiser(config), tensors)
    tower.time_rounding = getattr(torch, rounding)
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    rows = (given[n] for n in ("ids", "lengths", "context_lengths", "conditioned"))
    with torch.no_grad():
        expected = tower(*rows, given).numpy()
    for row, length in enumerate(LENGTHS):
        if length:
            assert difference(logits[row, :length], expected[row, :length]) < TOLERANCE


@pytest.mark.parametrize("model", WITH_ATTENTION, indirect=True)
def test_a_denoise_step_writes_only_into_the_room_at_the_end_of_a_cache(model):
    """The context's keys and values are read again, by the next step and the next request."""
    config, tensors = model
    runner, weights = built(config, "denoiser", tensors)
    feed, states = drawn_call(config, "denoiser", [5, 0], [LONGEST, 7], tokens=5)
    names = [one.name for one in runner.get_outputs() if one.name.endswith("cache_new")]
    assert len(names) == 2 * config.pattern.count("*")
    for name, value in run(runner, names, feed, weights).items():
        before = states[name.removesuffix("_new")]
        np.testing.assert_array_equal(value[:, :, :-5], before[:, :, :-5])
        assert not (value[:, :, -5:] == before[:, :, -5:]).any()


def test_caches_are_updated_where_they_lie():
    """ONNX Runtime writes only the call's tokens where input and output are one buffer."""
    config = tiny_config("*", 32, "float32")
    runner, weights = built(config, "context", random_tensors(config, seed=1))
    feed, states = drawn_call(config, "context", [4], [3], tokens=4)
    expected = run(runner, [f"{name}_new" for name in states], feed, weights)
    io, of = runner.io_binding(), ort.OrtValue.ortvalue_from_numpy
    for name, array in {**feed, **weights}.items():
        io.bind_ortvalue_input(name, of(array))
    for name, array in states.items():
        array[:, :, 3:] = 0
        io.bind_ortvalue_output(f"{name}_new", of(array))
    runner.run_with_iobinding(io)
    for array, value in zip(states.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(array[:, :, :7], value[:, :, :7])
        assert not array[:, :, 7:].any()


@pytest.mark.parametrize("tower", ["context", "denoiser"])
@pytest.mark.parametrize("rubbish", [-1e4, 1e4])
def test_what_a_cache_holds_past_its_context_changes_nothing(tower, rubbish):
    """Leftovers of another request, all finite; the second row is given no token at all."""
    config = tiny_config("*ME*", 32, "float32")
    runner, weights = built(config, tower, random_tensors(config, seed=1))
    feed, states = drawn_call(config, tower, [4, 0], [3, 0], tokens=5)
    names = [one.name for one in runner.get_outputs() if "cache" not in one.name]

    def after(past):
        for name, state in states.items():
            if name.endswith("_cache"):
                state[0, :, 3:] = state[1] = past
        return run(runner, names, feed, weights)

    clean, dirty = after(0.0), after(rubbish)
    for name, value in clean.items():
        np.testing.assert_array_equal(value, dirty[name], err_msg=name)
        assert not np.isnan(value).any(), name


def test_a_plain_pass_has_no_time_conditioning(model):
    """One token, conditioned 0: the pass of mock-AR."""
    config, tensors = model
    runner, weights = built(config, "denoiser", tensors)
    feed, _ = drawn_call(config, "denoiser", [1], [4], tokens=1, conditioned=0)
    changed = {n: w + 1.0 if n.startswith(("t_", "scale_")) else w for n, w in weights.items()}
    plain, same, other = (
        run(runner, ["logits"], feed, *more)["logits"]
        for more in ([weights], [changed], [weights, {"conditioned": np.ones(1, np.int32)}])
    )
    np.testing.assert_array_equal(plain, same)
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
