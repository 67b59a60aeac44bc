"""The body of `twotower::RefineBlock` against the independent reference of its rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from scipy import stats

from tests.support import reference
from twotower_contract.policies import POLICIES
from twotower_export.graph import build_refine_graph
from twotower_export.graph.body import OPSET, Body, prefixed
from twotower_export.graph.refine import _gumbel
from twotower_export.reference.refinement import Rule, gumbel
from twotower_export.reference.refinement import refine as rules_refine
from twotower_export.tiny.checkpoints import tiny_config

MASK = 3
V = 261
ROW_DTYPES = {"threshold": np.float32, "temperature": np.float32}


@pytest.fixture(scope="module")
def refine():
    graph = build_refine_graph(tiny_config("M", vocab_size=V), "float32", {}, {})
    runner = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    names = [output.name for output in runner.get_outputs()]

    def run(logits, ids, **rows):
        batch = len(ids)
        defaults = {"temperature": 0.0, "policy": 0, "seed": 0, "lengths": ids.shape[1]}
        feed = {
            name: np.broadcast_to(np.asarray(value, ROW_DTYPES.get(name, np.int32)), (batch,))
            for name, value in {**defaults, **rows}.items()
        }
        feed |= {"logits": logits.astype(np.float32), "ids": ids.astype(np.int32)}
        return dict(zip(names, runner.run(names, feed), strict=True))

    return run


@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_commits_what_the_policy_says(refine, policy, block):
    generator = np.random.default_rng(block)
    batch = 24
    sharpness = generator.choice([0.5, 2.0, 6.0], (batch, block, 1))
    logits = sharpness * generator.standard_normal((batch, block, V))
    ids = np.where(generator.random((batch, block)) < 0.7, MASK, generator.integers(4, V))
    lengths = generator.integers(0, block + 1, batch)
    parameter = generator.uniform(0.05, 2.0 if policy in ("factor", "entropy") else 1.0, batch)
    steps_left = generator.integers(1, 17, batch)
    got = refine(
        logits,
        ids,
        lengths=lengths,
        threshold=parameter,
        steps_left=steps_left,
        policy=POLICIES[policy],
    )
    for row, n in enumerate(lengths):
        rule = parameter[row], steps_left[row], 0.0, policy
        expected = reference.refine(logits[row], ids[row], *rule, length=n)
        np.testing.assert_array_equal(got["new_ids"][row], expected[0])
        np.testing.assert_allclose(got["confidence"][row], expected[1], rtol=1e-5)
        np.testing.assert_array_equal(got["committed"][row], expected[2])
        assert got["still_masked"][row] == expected[3]


def test_the_threshold_is_strict_and_the_first_step_commits_at_least_one(refine):
    logits = np.zeros((1, 4, V))
    logits[0, :, 9] = 1e4  # confidence 1 exactly
    ids = np.full((1, 4), MASK)
    got = refine(logits, ids, threshold=1.0, steps_left=16)
    assert got["still_masked"] == [3]
    assert refine(logits, ids, threshold=0.999, steps_left=16)["still_masked"] == [0]


def logits_near(refine, confidence):
    """Logits whose confidence is exactly this float32, and such whose is the next one above.

    Two tokens share the probability: the distance of their logits is searched among neighbours.
    """
    distance = np.float32(math.log(confidence / (1 - float(confidence))))
    steps = np.arange(-200, 200).astype(np.int32)
    distances = (distance.view(np.int32) + steps).view(np.float32)
    logits = np.full((len(steps), 1, V), -1e30, np.float32)
    logits[:, 0, 9], logits[:, 0, 10] = distances, 0
    got = refine(logits, np.full((len(steps), 1), MASK), threshold=0.5, steps_left=1)["confidence"]
    found = []
    for wanted in (confidence, np.nextafter(confidence, np.float32(1))):
        (at, *_) = np.flatnonzero(got[:, 0] == wanted)
        found.append(logits[at, 0])
    return found


@pytest.mark.parametrize("threshold", [0.8, 0.9])
def test_a_confidence_equal_to_the_float32_threshold_is_not_above_it(refine, threshold):
    """0.8 is above its double in float32, 0.9 below: comparing in float64 would take the first."""
    rounded = np.float32(threshold)
    assert (float(rounded) > threshold) == (threshold == 0.8)
    ids = np.full((1, 16), MASK)
    for row, still in zip(logits_near(refine, rounded), (15, 0), strict=True):
        logits = np.tile(row, (1, 16, 1))
        got = refine(logits, ids, threshold=threshold, steps_left=16)
        assert got["still_masked"] == [still]
        rules = rules_refine(
            logits[0],
            ids[0],
            Rule(threshold=threshold, steps_left=16),
            mask_id=MASK,
            confidence=got["confidence"][0],
        )
        assert rules.still_masked == still
        assert (rules.committed == got["committed"][0]).all()


def test_the_share_of_a_step_does_not_overflow(refine):
    logits = np.random.default_rng(9).standard_normal((1, 5, V))
    got = refine(logits, np.full((1, 5), MASK), threshold=1.0, steps_left=2**31 - 1)
    assert got["still_masked"] == [4]
    assert (
        refine(logits, np.full((1, 5), 5), threshold=1.0, steps_left=2**31 - 1)["still_masked"]
    ) == [0]


def test_of_equal_confidences_the_later_position_goes_first(refine):
    logits = np.tile(np.random.default_rng(0).standard_normal(V), (1, 6, 1))
    got = refine(logits, np.full((1, 6), MASK), threshold=1.0, steps_left=3)
    assert got["committed"].tolist() == [[0, 0, 0, 0, 1, 1]]


def test_equal_logits_give_the_lowest_token(refine):
    logits = np.zeros((1, 1, V))
    logits[0, 0, [40, 17, 99]] = 5.0
    assert refine(logits, np.full((1, 1), MASK), threshold=0.9, steps_left=1)["new_ids"] == [[17]]


def test_the_mask_is_never_predicted(refine):
    logits = np.full((2, 3, V), -1e30)
    logits[..., MASK] = 1e30
    for temperature in (0.0, 1.0):
        got = refine(
            logits, np.full((2, 3), MASK), threshold=0.5, steps_left=1, temperature=temperature
        )
        assert (got["new_ids"] != MASK).all()
        assert (got["still_masked"] == 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_their_row_only(refine, poison):
    generator = np.random.default_rng(5)
    logits = generator.standard_normal((3, 4, V))
    logits[1, 2, 100] = poison
    logits[2, 1, 100] = poison  # decided already: nobody looks
    ids = np.full((3, 4), MASK)
    ids[2, 1] = 7
    got = refine(logits, ids, threshold=0.9, steps_left=4)
    assert got["still_masked"][1] == -1
    assert (got["committed"][1] == 0).all()
    assert (got["new_ids"][1] == MASK).all()
    assert (got["still_masked"][[0, 2]] >= 0).all()


def test_decided_positions_and_inactive_rows_stay(refine):
    logits = np.random.default_rng(6).standard_normal((2, 5, V))
    ids = np.array([[MASK, 8, MASK, 9, 10], [MASK, MASK, MASK, MASK, MASK]])
    got = refine(logits, ids, lengths=[5, 0], threshold=0.0, steps_left=1)
    assert got["new_ids"][0, [1, 3, 4]].tolist() == [8, 9, 10]
    assert (got["new_ids"][1] == MASK).all()
    assert got["still_masked"].tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_distribution(refine, temperature):
    """Chi-square over many seeds and positions, at a level that fails once in ten thousand."""
    generator = np.random.default_rng(7)
    logits = np.full(V, -60.0)
    tokens = [4, 50, 51, 128, 200, 260]
    logits[tokens] = generator.standard_normal(len(tokens))
    draws, block = 500, 16
    got = refine(
        np.tile(logits, (draws, block, 1)),
        np.full((draws, block), MASK),
        threshold=0.0,
        steps_left=1,
        temperature=temperature,
        seed=generator.integers(0, 2**31 - 1, draws),
    )
    counts = np.array([(got["new_ids"] == token).sum() for token in tokens])
    assert counts.sum() == draws * block
    p = np.exp(logits[tokens] / temperature)
    assert stats.chisquare(counts, p / p.sum() * counts.sum()).pvalue > 1e-4


def test_confidence_does_not_know_the_temperature(refine):
    logits = np.random.default_rng(8).standard_normal((1, 8, V))
    ids = np.full((1, 8), MASK)
    got = refine(logits, ids, threshold=0.5, steps_left=1, temperature=3.0, seed=11)
    scores = np.where(np.arange(V) == MASK, -np.inf, logits[0])
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = np.exp(log_p[np.arange(8), got["new_ids"][0]])
    np.testing.assert_allclose(got["confidence"][0], expected, rtol=1e-5)


def test_noise_depends_on_seed_and_position_and_nothing_else(refine):
    logits = np.zeros((3, 8, V))
    ids = np.full((3, 8), MASK)
    got = refine(logits, ids, threshold=0.5, steps_left=1, temperature=1.0, seed=[1, 2, 1])[
        "new_ids"
    ]
    assert (got[0] == got[2]).all()
    assert (got[0] != got[1]).any()
    assert len(set(got[0])) > 4


@pytest.fixture
def noise_model():
    """The noise alone, as the graph has it: seed [1] int32 -> [1, 4, 5000]."""
    b = Body(ir.DataType.FLOAT)
    seed = ir.val("seed", ir.DataType.INT32, [1])
    vocabulary = b.unsqueeze(b.arange(b.i64([5000])), 0, 1)
    noise = _gumbel(b, vocabulary, seed, b.arange(b.i64([4])))
    noise.name, noise.type = "noise", ir.TensorType(ir.DataType.FLOAT)
    nodes = prefixed(b.op.tape.nodes, "noise")
    graph = ir.Graph([seed], [noise], nodes=nodes, opset_imports={"": OPSET}, name="noise")
    return ir.to_proto(ir.Model(graph, ir_version=10))


@pytest.mark.parametrize("error", [0, 4e-7])
def test_noise_is_the_rules_and_does_not_depend_on_a_fast_log(noise_model, error):
    """A GPU's log near 1 is off by 4e-7, where -log(U) is as small as 6e-8."""
    logs = [node for node in noise_model.graph.node if node.op_type == "Log"]
    for node in logs:
        at = list(noise_model.graph.node).index(node)
        added = onnx.helper.make_node("Add", [f"{node.output[0]}.exact", "error"], node.output[:])
        node.output[0] = added.input[0]
        noise_model.graph.node.insert(at + 1, added)
    value = np.array(error, np.float32)
    noise_model.graph.initializer.append(onnx.numpy_helper.from_array(value, "error"))
    runner = ort.InferenceSession(noise_model.SerializeToString())
    for seed in (0, 20240607, 2**31 - 1):
        (got,) = runner.run(None, {"seed": np.array([seed], np.int32)})
        want = gumbel(seed, np.arange(4), 5000)
        assert want.max() > 8
        np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-4 if error else 2e-6)


@pytest.mark.parametrize("temperature", [[0.0, 0.0], [0.0, 0.7]])
def test_a_greedy_row_draws_no_noise(refine, temperature):
    """Neither alone, where noise is left out, nor beside a row that samples."""
    logits = np.random.default_rng(3).standard_normal((2, 8, V)) * 0.1
    ids = np.full((2, 8), MASK)
    got = refine(logits, ids, threshold=0.5, steps_left=1, temperature=temperature)["new_ids"]
    best = np.where(np.arange(V) == MASK, -np.inf, logits).argmax(-1)
    np.testing.assert_array_equal(got[0], best[0])
    assert (got[1] == best[1]).all() == (temperature[1] == 0)


def test_noise_and_entropy_are_computed_on_demand_alone(tmp_path):
    """What ONNX Runtime ran, by its own record."""
    graph = build_refine_graph(tiny_config("M", vocab_size=V), "float32", {}, {})

    def operators(temperature, policy):
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "run")
        runner = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
        rows = {"temperature": temperature, "policy": policy, "lengths": 4, "steps_left": 2}
        rows |= {"threshold": 0.5, "seed": 0}
        feed = {n: np.full(1, v, ROW_DTYPES.get(n, np.int32)) for n, v in rows.items()}
        ids = np.full((1, 4), MASK, np.int32)
        runner.run(None, {**feed, "ids": ids, "logits": np.zeros((1, 4, V), np.float32)})
        events = json.loads(Path(runner.end_profiling()).read_text())
        return {event["name"] for event in events if event["cat"] == "Node"}

    def ran(part, names):
        return any(part in name for name in names)

    greedy = operators(0.0, POLICIES["threshold"])
    assert ran("statistics.log_p", greedy)
    assert not ran("noise", greedy)
    assert not ran("entropy.reducesum", greedy)
    assert ran("noise", operators(0.5, POLICIES["threshold"]))
    assert ran("entropy.reducesum", operators(0.0, POLICIES["entropy"]))
