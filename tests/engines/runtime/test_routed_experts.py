"""The experts' nodes of the CPU flavour against the sum written plainly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime.packed_session import packed_session
from twotower_engines.runtime.routed_experts import replace_experts

EXPERTS, CHOSEN, HIDDEN, INNER = 7, 3, 24, 20


@pytest.fixture(scope="module")
def banks():
    draw = np.random.default_rng(1)
    up = draw.standard_normal((EXPERTS, INNER, HIDDEN), np.float32) / HIDDEN**0.5
    return {"up": up, "down": draw.standard_normal((EXPERTS, HIDDEN, INNER), np.float32)}


@pytest.fixture(scope="module")
def experts():
    """A function that opens a graph of one `SparseExperts` node with some banks."""

    def open_with(banks, gated=False):
        args = {
            "x": (TensorProto.FLOAT, ["rows", "tokens", HIDDEN]),
            "indices": (TensorProto.INT32, ["n", CHOSEN]),
            "weights": (TensorProto.FLOAT, ["n", CHOSEN]),
            "shared": (TensorProto.FLOAT, ["n", HIDDEN]),
            "hidden": (TensorProto.FLOAT, ["n", HIDDEN]),
            "gate": (TensorProto.FLOAT, ["rows", 1, HIDDEN]),
            "up": (TensorProto.FLOAT, [EXPERTS, INNER, HIDDEN]),
            "down": (TensorProto.FLOAT, [EXPERTS, HIDDEN, INNER]),
        }
        node = helper.make_node(
            "SparseExperts", list(args), ["y"], "experts", domain="twotower", gated=int(gated)
        )
        values = [helper.make_tensor_value_info(name, *kind) for name, kind in args.items()]
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", HIDDEN])
        graph = helper.make_graph([node], "one", values, [y])
        parts = replace_experts(graph)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
        onnx.checker.check_model(model)
        ort = import_onnxruntime()
        weights = [pair for n, bank in banks.items() for pair in parts[n](bank).items()]
        session, kept = packed_session(ort, model, weights, ort.SessionOptions())
        assert not kept
        return lambda *inputs: session.run(["y"], dict(zip(args, layer(*inputs), strict=False)))[0]

    return open_with


def drawn(seed, tokens):
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((tokens, HIDDEN), np.float32)
    indices = np.stack([draw.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    return x, indices.astype(np.int32), draw.random((tokens, CHOSEN), np.float32)


def layer(x, indices, weights, shared=0.0, hidden=0.0, gate=1.0, rows=1):
    """What the op takes: the rest of the layer adds nothing unless it is given."""
    whole = (np.broadcast_to(np.float32(one), x.shape) for one in (shared, hidden))
    gate = np.broadcast_to(np.float32(gate), (rows, 1, HIDDEN))
    return x.reshape(rows, -1, HIDDEN), indices, weights, *whole, gate


def plainly(banks, x, indices, weights):
    y = np.zeros(x.shape)
    for token, row in enumerate(indices):
        for expert, weight in zip(row, weights[token], strict=True):
            if expert >= 0:
                inner = np.maximum(banks["up"][expert].astype(np.float64) @ x[token], 0) ** 2
                y[token] += weight * (banks["down"][expert] @ inner)
    return y


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_experts_are_summed_by_their_weights(experts, banks, tokens):
    x, indices, weights = drawn(tokens, tokens)
    indices[tokens // 2] = -1  # padding
    y = experts(banks)(x, indices, weights)
    expected = plainly(banks, x, indices, weights)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max(initial=1.0))


@pytest.mark.parametrize("gated", [True, False])
def test_the_rest_of_a_layer_is_added(experts, banks, gated):
    inputs = drawn(6, 12)
    draw = np.random.default_rng(6)
    shared, hidden = (draw.standard_normal((12, HIDDEN), np.float32) for _ in range(2))
    gate = draw.standard_normal((3, 1, HIDDEN), np.float32)
    run = experts(banks, gated)
    y = run(*inputs, shared, hidden, gate, 3)
    factor = np.repeat(gate[:, 0], 4, axis=0) if gated else 1
    np.testing.assert_array_equal(y, hidden + factor * (experts(banks)(*inputs) + shared))


def test_a_token_is_the_same_alone_and_in_a_batch(experts, banks):
    inputs = drawn(3, 33)
    run = experts(banks)
    together = run(*inputs)
    for token in range(33):
        alone = run(*(values[token : token + 1] for values in inputs))
        np.testing.assert_array_equal(alone[0], together[token])


def test_a_token_that_is_no_number_spoils_no_other(experts, banks):
    x, indices, weights = drawn(4, 9)
    run = experts(banks)
    before = run(x, indices, weights)
    x[4] = np.nan
    after = run(x, indices, weights)
    assert np.isnan(after[4]).all()
    np.testing.assert_array_equal(np.delete(after, 4, 0), np.delete(before, 4, 0))


def test_only_the_chosen_experts_are_read(experts, banks):
    x, indices, weights = drawn(5, 4)
    indices[:] = [0, 2, 5]
    poisoned = {name: bank.copy() for name, bank in banks.items()}
    for bank in poisoned.values():
        bank[[1, 3, 4, 6]] = np.nan
    y = experts(poisoned)(x, indices, weights)
    np.testing.assert_array_equal(y, experts(banks)(x, indices, weights))
