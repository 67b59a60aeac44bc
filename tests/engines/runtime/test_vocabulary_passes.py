"""The denoiser's graph with fewer passes over logits, against the exported one, value for value."""

from __future__ import annotations

import numpy as np
import onnx.inliner
import pytest

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_contract.policies import POLICIES
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.mamba_steps import replace_mamba_steps
from twotower_engines.runtime.packed_session import packed_session
from twotower_engines.runtime.pruning import flat_graph, make_optional, prune
from twotower_engines.runtime.routed_experts import replace_experts
from twotower_engines.runtime.vocabulary_passes import refine_masked_rows

MASK, BLOCK = 3, 8
REFINED = ["new_ids", "confidence", "still_masked"]


@pytest.fixture(scope="module")
def sessions(random_engines):
    """The denoiser's session with all passes, and with fewer; a vocabulary of 20 x 15 tokens."""
    made = random_engines("ME", seed=4)
    ort = import_onnxruntime()

    def opened(spare):
        model = flat_graph(made.folder / "denoiser.onnx")
        replace_mamba_steps(model.graph, with_states=False)
        prune(model.graph, [*REFINED, "logits"])
        parts = replace_experts(model.graph)
        if spare:
            model = refine_masked_rows(model, "asked", 300, MASK)
            kinds = [node.op_type for node in model.graph.node]
            assert {"Softmax", "ScatterElements"} <= set(kinds)
            assert not {"RefineBlock", "ArgMax"} & set(kinds)
            make_optional(model.graph, "logits", "asked")
        else:
            model = onnx.inliner.inline_local_functions(model)
        weights = WeightStore(made.engines.manifest).all_float32("denoiser")
        pairs = [
            pair
            for name, array in weights
            for pair in (parts[name](array) if name in parts else {name: array}).items()
        ]
        return packed_session(ort, model, iter(pairs), ort.SessionOptions())[0]

    return opened(False), opened(True)


def run(session, outputs, inputs, asked=False):
    takes = {value.name for value in session.get_inputs()}
    given = {"asked": np.array([asked])} if "asked" in takes else {}
    return session.run(outputs, inputs | given)


def inputs_of(session, ids, **rows):
    draw = np.random.default_rng(9)
    count = len(ids)
    given = {
        "ids": ids, "lengths": [BLOCK, BLOCK - 3, 0][:count], "context_lengths": [5] * count,
        "conditioned": [1] * count, "threshold": [0.3] * count, "steps_left": [4] * count,
        "temperature": [0.0] * count, "policy": [0] * count, "seed": [7] * count,
    } | rows  # fmt: skip
    types = {"tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(bool)": np.bool_}
    found = {}
    for value in session.get_inputs():
        if value.name in given:
            found[value.name] = np.array(given[value.name], types[value.type])
        else:
            found[value.name] = draw.standard_normal((count, *value.shape[1:])).astype(np.float32)
    return found


def blocks(*masked):
    ids = np.random.default_rng(3).integers(4, 300, (len(masked), BLOCK)).astype(np.int32)
    for row, places in zip(ids, masked, strict=True):
        row[list(places)] = MASK
    return ids


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("masked", [[range(8)], [[]], [[0, 3, 7], range(8), [1]], [[], [2], []]])
def test_a_step_is_the_same(sessions, policy, temperature, masked):
    count = len(masked)
    temperatures = [temperature, 0.0, temperature][:count]
    rows = {"policy": [policy] * count, "temperature": temperatures}
    inputs = inputs_of(sessions[0], blocks(*masked), **rows)
    whole, spared = (run(session, REFINED, inputs) for session in sessions)
    np.testing.assert_array_equal(spared[0], whole[0])
    np.testing.assert_allclose(spared[1], whole[1], rtol=1e-5)
    np.testing.assert_array_equal(spared[2], whole[2])


def test_logits_that_are_asked_for_are_those_of_every_position(sessions):
    inputs = inputs_of(sessions[0], blocks([1, 2], range(8)))
    whole, spared = (run(session, ["logits", *REFINED], inputs, True) for session in sessions)
    assert whole[0].shape == (2, BLOCK, 300)
    np.testing.assert_allclose(spared[0], whole[0], atol=1e-5)
    np.testing.assert_array_equal(spared[1], whole[1])


def test_what_is_no_number_fails_its_row_alone(sessions):
    inputs = inputs_of(sessions[0], blocks([1, 2], range(8)))
    state = next(name for name in inputs if "ssm_state" in name)
    inputs[state][1] = np.nan
    for session in sessions:
        left = run(session, ["still_masked"], inputs)[0]
        assert left[1] == -1
        assert left[0] >= 0


def test_a_step_is_known_by_its_form_and_not_by_names(random_engines):
    path = random_engines("ME", seed=4).folder / "denoiser.onnx"
    model = flat_graph(path)
    (step,) = (function for function in model.functions if function.name == "RefineBlock")
    for nodes in (model.graph.node, step.node):
        for number, node in enumerate(nodes):
            node.name = f"node {number}"
    refined = refine_masked_rows(model, "asked", 300, MASK)
    assert any(node.op_type == "Softmax" for node in refined.graph.node)

    other = flat_graph(path)
    (step,) = (function for function in other.functions if function.name == "RefineBlock")
    next(node for node in step.node if node.op_type == "And").op_type = "Xor"
    with pytest.raises(RuntimeLoadError, match=r"another form .*: .* Xor, .* export and build"):
        refine_masked_rows(other, "asked", 300, MASK)
