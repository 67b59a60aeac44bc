"""The Mamba step of the CPU flavour against the exported one, value for value."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime import mamba_steps
from twotower_engines.runtime.mamba_recurrence import CHUNK, whole_chunks
from twotower_engines.runtime.pruning import flat_graph, prune

B, LONG = 3, 3 * CHUNK


ODD = {"mamba_head_dim": 32, "ssm_state_size": 7}


@pytest.fixture(scope="module", params=[({}, True), (ODD, True), (ODD, False)])
def steps(request, random_engines):
    """The first step of a graph, as it is exported and in a CPU's operators; and sizes."""
    odd, blocked = request.param
    made = random_engines("ME", seed=4, **odd)
    model = flat_graph(made.folder / "context.onnx")
    node = next(node for node in model.graph.node if node.op_type == "MambaBlockStep")
    config = made.engines.manifest.model
    heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    sizes = [
        *(["B", "L", config.d_inner + config.conv_dim + heads], ["B", 3, config.conv_dim]),
        *(["B", heads, width, state], ["B"], [config.conv_dim, 4], [config.conv_dim]),
        *([heads], [heads], [heads], [config.d_inner]),
    ]
    kinds = [6 if size == ["B"] else 1 for size in sizes]
    values = map(helper.make_tensor_value_info, node.input, kinds, sizes)
    results = [helper.make_tensor_value_info(name, 1, None) for name in node.output]
    del model.graph.node[:], model.graph.input[:], model.graph.output[:]
    model.graph.node.append(node)
    model.graph.input.extend(values)
    model.graph.output.extend(results)
    for result in model.graph.output:
        result.type.tensor_type.shape.dim.extend(
            onnx.TensorShapeProto.Dimension() for _ in range(4 - ("conv" in result.name))
        )
    del model.graph.output[0].type.tensor_type.shape.dim[3:]
    with_states, without = onnx.ModelProto(), onnx.ModelProto()
    for ours in (with_states, without):
        ours.CopyFrom(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mamba_steps, "BLOCKED", blocked)
            mamba_steps.replace_mamba_steps(ours.graph, with_states=ours is with_states)
        del ours.functions[:]
    prune(without.graph, node.output[:1])
    sessions = [
        import_onnxruntime().InferenceSession(one.SerializeToString(), providers=PROVIDERS)
        for one in (model, with_states, without)
    ]
    return sessions, list(node.input), sizes


PROVIDERS = ["CPUExecutionProvider"]


def draw(sizes, tokens, lengths):
    """Return random inputs of the exported step."""
    random = np.random.default_rng(0)
    known = {"B": B, "L": tokens}
    given = [
        random.standard_normal([known.get(size, size) for size in shape]).astype(np.float32)
        for shape in sizes
    ]
    given[3] = np.array(lengths, np.int32)
    return given


def turned(given):
    """Return the inputs with the state as ours keeps it."""
    return [*given[:2], given[2].transpose(0, 1, 3, 2).copy(), *given[3:]]


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("tokens", [1, 9, CHUNK, LONG])
def test_rows_of_any_length_give_the_same_values_and_states(steps, tokens):
    (exported, ours, _), names, sizes = steps
    given = draw(sizes, tokens, [tokens, max(1, tokens // 2), 1])
    y, columns, state = exported.run(None, dict(zip(names, given, strict=True)))
    found, found_columns, new = ours.run(None, dict(zip(names, turned(given), strict=True)))
    for row, length in enumerate(given[3]):
        assert_close(found[row, :length], y[row, :length])
    np.testing.assert_array_equal(found_columns, columns)
    assert_close(new.transpose(0, 1, 3, 2), state)


@pytest.mark.parametrize("tokens", [1, 9, CHUNK, 2 * CHUNK + 1])
def test_the_denoisers_steps_give_the_same_values_and_no_states(steps, tokens):
    (exported, _, ours), names, sizes = steps
    given = draw(sizes, tokens, [tokens, max(1, tokens // 2), 1])
    y, *_ = exported.run(None, dict(zip(names, given, strict=True)))
    (found,) = ours.run(None, dict(zip(names, turned(given), strict=True)))
    for row, length in enumerate(given[3]):
        assert_close(found[row, :length], y[row, :length])


@pytest.mark.parametrize("length", [2, 5, CHUNK, 2 * CHUNK])
def test_a_row_gives_the_same_bits_alone_and_with_longer_ones(steps, length):
    (_, *ours), names, sizes = steps
    given = turned(draw(sizes, LONG, [LONG, length, LONG]))
    alone = [given[0][1:2, :length], *(value[1:2] for value in given[1:4]), *given[4:]]
    for session in ours:
        y, *states = session.run(None, dict(zip(names, given, strict=True)))
        own, *own_states = session.run(None, dict(zip(names, alone, strict=True)))
        np.testing.assert_array_equal(y[1, :length], own[0])
        for state, own_state in zip(states, own_states, strict=True):
            np.testing.assert_array_equal(state[1], own_state[0])


def test_calls_are_filled_up_to_whole_chunks():
    assert [whole_chunks(n) for n in (1, 9, 16, 17, 32, 250)] == [1, 9, 16, 32, 32, 256]
