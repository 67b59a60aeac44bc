"""`RefineBlock`: the kernels, interpreted, against the float64 reference."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton.language as tl
from scipy.stats import kstest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.support import ROOT, kernel_launches
from tests.support.kernel_inputs import BOUNDS, MASK, block, mixed_rows, row_tensors
from tests.support.kernel_reference import Row, gumbel, refine_row
from twotower_contract.policies import POLICIES
from twotower_engines.kernels import jit, noise, vocabulary
from twotower_export.graph.policies import POLICY_RULES
from twotower_export.reference.refinement import POLICIES as EXPORTED

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN is on purpose here


def step(
    logits: torch.Tensor, ids: np.ndarray, rows: list[Row], mask_id: int = MASK
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The kernels on a batch."""
    block_ids = torch.from_numpy(ids.astype(np.int32))
    made = kernel_launches.refine_block(logits, block_ids, *row_tensors(rows), mask_id)
    return tuple(x.numpy() for x in made)


def check(
    logits: torch.Tensor, ids: np.ndarray, rows: list[Row], mask_id: int = MASK
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The kernels' decisions equal the reference's, and confidences to float32's precision."""
    got = step(logits, ids, rows, mask_id)
    exact = logits.double().numpy()
    for b, row in enumerate(rows):
        want = refine_row(exact[b], ids[b].astype(np.int32), row, mask_id)
        np.testing.assert_array_equal(got[0][b], want[0], err_msg=f"ids of row {b}, {row}")
        np.testing.assert_array_equal(got[2][b], want[2], err_msg=f"commits of row {b}, {row}")
        assert got[3][b] == want[3], f"row {b}, {row}"
        if want[3] >= 0:
            np.testing.assert_allclose(got[1][b], want[1], rtol=2e-6)
    return got


@pytest.mark.parametrize(
    ("B", "S", "V", "dtype"),
    [
        (10, 6, 257, torch.float32),
        (5, 16, 257, torch.bfloat16),
        (5, 4, 17, torch.float32),
        (5, 7, 300, torch.bfloat16),
        (2, 33, 64, torch.float32),
        (1, 1, 5, torch.float32),
        (2, 2, 4097, torch.float32),  # the last tile has one token
        (1, 2, 4097, torch.float32),  # the last split, too
        (2, 2, 8192, torch.bfloat16),  # full tiles alone
        (2, 2, 9001, torch.bfloat16),
    ],
)
def test_batches_of_mixed_policies(B: int, S: int, V: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(B * 1000 + S + V)
    logits = torch.from_numpy(generator.normal(0, 3, (B, S, V))).to(dtype)
    check(logits, block(generator, B, S, V, 0.7), mixed_rows(generator, B, S))


@pytest.mark.parametrize("seed", range(8))
def test_random_sizes(seed: int) -> None:
    """Odd vocabularies, blocks, batches, lengths, bounds and mask tokens, as they come."""
    generator = np.random.default_rng(100 + seed)
    B, S = (int(generator.integers(1, n)) for n in (6, 20))
    V = int(generator.choice([generator.integers(2, 90), generator.integers(500, 5000)]))
    S = S if V < 500 else min(S, 3)
    mask_id = int(generator.integers(V))
    logits = generator.normal(0, generator.choice([0.5, 3, 8]), (B, S, V))
    ids = np.where(generator.random((B, S)) < 0.7, mask_id, (mask_id + 1) % V)
    rows = [
        Row(
            length=int(generator.integers(0, S + 1)),
            threshold=float(np.float32(generator.uniform(0.01, 2 * BOUNDS[policy] + 0.1))),
            steps_left=int(generator.integers(-1, 9)),
            temperature=float(np.float32(generator.choice([0.0, 0.05, 0.5, 1.0, 4.0]))),
            policy=int(policy),
            seed=int(generator.integers(0, 2**31)),
        )
        for policy in generator.integers(0, len(POLICIES), B)
    ]
    dtype = torch.float32 if seed % 2 else torch.bfloat16
    check(torch.from_numpy(logits).to(dtype), ids, rows, mask_id)


def test_splits_grow_with_the_batch_and_change_no_token() -> None:
    """A row alone is cut finer than in a batch; noise and ties do not know of it."""
    logits = torch.from_numpy(np.random.default_rng(10).normal(0, 2, (3, 2, 5000))).bfloat16()
    rows = [Row(2, temperature=t, steps_left=1, seed=7) for t in (0.0, 0.3, 1.0)]
    ids = np.full((3, 2), MASK)
    assert [vocabulary.tiles(n) * vocabulary.TILE for n in (1, 3, 64)] == [4096, 12288, 16384]
    together = check(logits, ids, rows)
    for b, row in enumerate(rows):
        alone = step(logits[b : b + 1], ids[b : b + 1], [row])
        np.testing.assert_array_equal(alone[0][0], together[0][b])
        np.testing.assert_allclose(alone[1][0], together[1][b], rtol=2e-6)


@pytest.mark.parametrize("peak", [0.0, 20.0])
def test_pieces_that_cannot_win_are_skipped_and_change_nothing(
    peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound on the noise made infinite, nothing is skipped: the same tokens win."""
    logits = torch.from_numpy(np.random.default_rng(11).normal(0, 2, (3, 2, 4500))).float()
    logits[:, :, 2100] += peak
    rows = [Row(2, temperature=t, steps_left=1, seed=3) for t in (0.1, 1.0, 2.0)]
    ids = np.full((3, 2), MASK)
    skipping = step(logits, ids, rows)
    monkeypatch.setattr(vocabulary, "MOST_NOISE", tl.constexpr(float("inf")))
    every = step(logits, ids, rows)
    for got, want in zip(skipping, every, strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_bound_on_the_noise_is_above_the_most_that_there_is() -> None:
    most = -np.log(-np.log((np.float64(2**23 - 1) + 0.5) / 2**23))
    assert most < np.float32(most + 1e-4) < noise.MOST_NOISE.value < most + 0.01


def test_both_packages_and_the_page_number_the_policies_alike() -> None:
    assert dict(enumerate(EXPORTED)) == {number: name for name, number in POLICIES.items()}
    assert list(POLICY_RULES) == list(EXPORTED)
    assert len(BOUNDS) == len(POLICIES), "the tests draw a bound for each"
    table = (ROOT / "docs" / "kernels.md").read_text()
    found = re.findall(r"^\| (\d) \| `(\w+)` \|", table, re.MULTILINE)
    assert {name: int(number) for number, name in found} == POLICIES


@pytest.mark.parametrize("policy", range(len(POLICIES)))
@pytest.mark.parametrize("masked", [0, 1, 16])
def test_none_one_or_all_masked(policy: int, masked: int) -> None:
    generator = np.random.default_rng(policy)
    logits = torch.from_numpy(generator.normal(0, 3, (1, 16, 65))).float()
    ids = np.full((1, 16), 9)
    ids[0, 16 - masked :] = MASK
    got = check(logits, ids, [Row(length=16, policy=policy, threshold=1.2, steps_left=5)])
    if masked == 0:
        assert got[3][0] == 0
        assert np.isinf(got[1]).all()
        np.testing.assert_array_equal(got[0], ids)
    if masked == 1:
        assert got[3][0] == 0, "a step commits at least one position"


def test_inactive_rows_are_untouched() -> None:
    generator = np.random.default_rng(3)
    logits = torch.from_numpy(generator.normal(0, 3, (2, 8, 65))).float()
    logits[0] = float("nan")
    ids = np.full((2, 8), MASK)
    got = check(logits, ids, [Row(length=0, steps_left=1), Row(length=5, steps_left=1)])
    np.testing.assert_array_equal(got[0][0], ids[0])
    assert got[3].tolist() == [0, 0]
    np.testing.assert_array_equal(got[0][1, 5:], MASK)


def test_the_last_step_commits_everything() -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(0, 3, (5, 16, 65))).float()
    rows = [
        Row(16, threshold=0.0, steps_left=steps, policy=p)
        for p, steps in enumerate([1, 0, -3, 1, 1])
    ]
    got = check(logits, np.full((5, 16), MASK), rows)
    assert (got[3] == 0).all()
    assert (got[0] != MASK).all()


def test_ties_take_the_lowest_token_and_the_highest_position() -> None:
    logits = torch.zeros(3, 6, 9000)
    logits[:, :, [700, 50, 8000]] = 5.0  # the same maximum in three places and two splits
    logits[:, :, MASK] = 50.0
    rows = [Row(6, threshold=0.99, steps_left=3, policy=policy) for policy in (0, 1, 3)]
    got = check(logits, np.full((3, 6), MASK), rows)
    for b in range(3):
        np.testing.assert_array_equal(got[0][b], [MASK] * 4 + [50, 50])


def test_confidence_must_exceed_the_threshold() -> None:
    logits = torch.full((1, 3, 8), -1e4)
    logits[0, :, 5] = 0.0
    logits[0, 2, 6] = 0.0  # one half, exactly representable on the way
    got = step(logits, np.full((1, 3), MASK), [Row(3, threshold=1.0, steps_left=3)])
    assert got[1].tolist()[0][:2] == [1.0, 1.0]
    assert got[3][0] == 2, "a confidence of 1 does not exceed a threshold of 1"
    got = step(logits, np.full((1, 3), MASK), [Row(3, threshold=0.75, steps_left=3)])
    assert got[3][0] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 4, 4999])
def test_a_broken_logit_fails_its_row_and_no_other(value: float, token: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(5).normal(0, 3, (3, 4, 5000))).float()
    logits[1, 2, token] = value
    got = check(logits, np.full((3, 4), MASK), [Row(4, steps_left=1, policy=p) for p in (0, 3, 4)])
    assert got[3].tolist() == [0, -1, 0]
    np.testing.assert_array_equal(got[0][1], MASK)
    assert not got[2][1].any()


def test_what_is_not_looked_at_may_be_broken() -> None:
    logits = torch.from_numpy(np.random.default_rng(6).normal(0, 3, (1, 4, 50))).float()
    logits[0, 0] = float("nan")  # decided
    logits[0, 3] = float("nan")  # past the row's length
    logits[0, :, MASK] = float("nan")  # the mask token
    ids = np.array([[7, MASK, MASK, MASK]])
    got = check(logits, ids, [Row(3, steps_left=1)])
    assert got[3][0] == 0


def test_nothing_possible_fails_the_row() -> None:
    logits = torch.full((2, 2, 40), float("-inf"))
    logits[:, :, MASK] = 0.0
    logits[1, :, 8] = -2.0  # one token possible: certain
    got = check(logits, np.full((2, 2), MASK), [Row(2), Row(2)])
    assert got[3].tolist() == [-1, 0]
    assert got[1][1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mask_id", [0, MASK])
def test_scores_that_overflow_still_give_a_token(mask_id: int) -> None:
    """A temperature that requests may not have: every score is -inf, and so all are equal."""
    logits = torch.full((1, 2, 5000), -20.0) - torch.arange(5000) * 0.01
    ids = np.full((1, 2), mask_id)
    got = step(logits, ids, [Row(2, temperature=1e-38, steps_left=1)], mask_id)
    assert got[0].tolist() == [[int(mask_id == 0)] * 2]
    assert got[3].tolist() == [0]


@pytest.mark.usefixtures("overflow_fails")
@pytest.mark.parametrize("policy", range(len(POLICIES)))
def test_the_share_of_a_step_does_not_overflow(policy: int) -> None:
    logits = torch.from_numpy(np.random.default_rng(9).normal(0, 1, (1, 5, 40))).float()
    row = Row(5, policy=policy, threshold=1e-6, steps_left=2**31 - 1)
    if policy == 0:
        row.threshold = 1.0
    got = check(logits, np.full((1, 5), MASK), [row])
    assert got[3].tolist() == [4], "a step commits one position"


@pytest.mark.parametrize("policy", range(len(POLICIES)))
def test_extreme_logits(policy: int) -> None:
    generator = np.random.default_rng(7)
    logits = torch.from_numpy(generator.normal(0, 1e30, (1, 4, 60))).float()
    logits[0, 1] = torch.from_numpy(generator.normal(-1e4, 1, 60)).float()
    logits[0, 2, ::2] = float("-inf")
    logits[0, 3] = 3e38
    check(logits, np.full((1, 4), MASK), [Row(4, policy=policy, threshold=0.5, steps_left=3)])


def test_the_mask_token_is_never_predicted() -> None:
    for mask_id, V in ((0, 33), (32, 33), (4096, 4097)):
        logits = torch.zeros(1, 2, V)
        logits[0, :, mask_id] = 100.0
        ids = np.full((1, 2), mask_id)
        got = check(logits, ids, [Row(2, steps_left=1)], mask_id)
        assert (got[0] != mask_id).all()
        np.testing.assert_allclose(got[1], 1 / (V - 1), rtol=1e-6)


@pytest.mark.usefixtures("overflow_fails")
def test_noise_is_a_function_of_seed_position_and_token() -> None:
    logits = torch.zeros(3, 2, 600)
    ids = np.full((3, 2), MASK)
    rows = [Row(2, temperature=1.0, steps_left=1, seed=seed) for seed in (0, 11, 2**31 - 2)]
    got = check(logits, ids, rows)
    assert len({tuple(row) for row in got[0].tolist()}) == 3
    alone = step(logits[1:2], ids[1:2], rows[1:2])
    np.testing.assert_array_equal(alone[0][0], got[0][1])


def store_noise(seed: tl.tensor, position: tl.tensor, out: tl.tensor, COUNT: tl.constexpr) -> None:
    """The noise of tokens 0 .. COUNT - 1."""
    token = tl.arange(0, COUNT)
    first, second = noise.noise_keys(tl.load(seed), position)
    tl.store(out + token, noise.gumbel(token, first, second))


@pytest.mark.usefixtures("overflow_fails")
@pytest.mark.parametrize(("seed", "position"), [(0, 0), (2**31 - 1, 63), (20240607, 15)])
def test_noise_is_the_reference_s_and_gumbel_distributed(seed: int, position: int) -> None:
    out = torch.empty(8192)
    jit.kernel(store_noise)[(1,)](
        torch.tensor([seed], dtype=torch.int32), position, out, COUNT=8192
    )
    want = [gumbel(seed, position, token) for token in range(8192)]
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
    assert kstest(out.numpy(), "gumbel_r").pvalue > 1e-4


def test_the_largest_noise_does_not_depend_on_a_fast_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's log near 1 is off by 4e-7, where -log(U) is as small as 6e-8."""
    exact = InterpreterBuilder.create_log

    def fast(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        made = exact(self, x)
        return TensorHandle(made.data + np.float32(4e-7), made.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_log", fast)
    out = torch.empty(8192)
    seed = torch.tensor([20240607], dtype=torch.int32)
    jit.kernel(store_noise)[(1,)](seed, 15, out, COUNT=8192)
    want = np.array([gumbel(20240607, 15, token) for token in range(8192)])
    assert want.max() > 8
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-4)
