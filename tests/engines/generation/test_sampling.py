"""Choosing tokens on the host: by distribution, not by eye."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from twotower_engines.generation.sampling import (
    filtered_probabilities,
    likeliest,
    row_seed,
    sample,
    uniform,
)

DRAWS = 4000
LOGITS = np.array([2.0, 1.0, 1.0, 0.5, -1.0, -40.0, 1.9, 0.0], np.float32)


def plain_probabilities(temperature, top_k, top_p):
    """The rules word by word, token by token, in Python floats."""
    powers = [float(np.exp(np.float64(logit) / temperature)) for logit in LOGITS]
    chances = {token: power / sum(powers) for token, power in enumerate(powers)}
    if top_k:
        least = sorted(chances.values(), reverse=True)[min(top_k, len(chances)) - 1]
        chances = {token: chance for token, chance in chances.items() if chance >= least}
    total = sum(chances.values())
    chances = {token: chance / total for token, chance in chances.items()}
    kept, before = {}, 0.0
    for token in sorted(chances, key=lambda token: (-chances[token], token)):
        if before > top_p:
            break
        kept[token] = chances[token]
        before += chances[token]
    total = sum(kept.values())
    return [kept.get(token, 0.0) / total for token in range(len(LOGITS))]


CASES = [
    pytest.param(1.0, 0, 1.0, id="plain"),
    pytest.param(0.5, 0, 1.0, id="cold"),
    pytest.param(3.0, 0, 1.0, id="hot"),
    pytest.param(1.0, 3, 1.0, id="top-k cuts through a tie"),
    pytest.param(1.0, 1, 1.0, id="top-k of one"),
    pytest.param(1.0, 99, 1.0, id="top-k beyond the vocabulary"),
    pytest.param(1.0, 0, 0.6, id="top-p"),
    pytest.param(1.0, 0, 1e-9, id="top-p of nothing keeps the first"),
    pytest.param(1.3, 4, 0.7, id="both"),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_probabilities_follow_the_rules(temperature, top_k, top_p):
    found = filtered_probabilities(LOGITS, temperature, top_k, top_p)
    np.testing.assert_allclose(found, plain_probabilities(temperature, top_k, top_p), atol=1e-12)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_draws_have_the_distribution(temperature, top_k, top_p, vary):
    def draw(number):
        seed, position = (7, number) if vary == "position" else (number, 7)
        return sample(LOGITS, temperature, top_k, top_p, seed, position)

    counts = np.bincount([draw(number) for number in range(DRAWS)], minlength=len(LOGITS))
    expected = DRAWS * np.array(plain_probabilities(temperature, top_k, top_p))
    impossible = expected == 0
    assert not counts[impossible].any()
    rare = (expected < 5) & ~impossible
    observed = [*counts[expected >= 5], counts[rare].sum()]
    wanted = np.array([*expected[expected >= 5], expected[rare].sum()])
    if wanted[-1] < 5:  # too rare to test even together: join it to the first
        observed[0] += observed.pop()
        wanted = np.array([wanted[0] + wanted[-1], *wanted[1:-1]])
    if len(observed) > 1:
        assert chisquare(observed, wanted).pvalue > 1e-4


def test_a_wrong_distribution_would_be_noticed():
    counts = np.bincount([sample(LOGITS, 1.0, 0, 1.0, 7, place) for place in range(DRAWS)])
    wrong = DRAWS * np.array(plain_probabilities(1.3, 0, 1.0))
    keep = wrong >= 5
    scale = counts[keep].sum() / wrong[keep].sum()
    assert chisquare(counts[keep[: len(counts)]], wrong[keep] * scale).pvalue < 1e-4


def test_greedy_takes_the_lowest_index_of_equals():
    assert sample(np.array([0, 3, 3, 1], np.float32), 0.0, 0, 1.0, 1, 1) == 1
    assert sample(np.array([0, 3, 3, 1], np.float32), -1.0, 2, 0.1, 1, 1) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 20])
def test_the_likeliest_tokens_come_in_order_and_equals_by_index(count):
    chances = plain_probabilities(1.0, 0, 1.0)
    logprob, top = likeliest(LOGITS, 3, count)
    assert logprob == pytest.approx(np.log(chances[3]))
    assert [token for token, _ in top] == [0, 6, 1, 2, 3, 7, 4, 5][:count]
    for token, one in top:
        assert one == pytest.approx(np.log(chances[token]))


def test_a_draw_depends_on_seed_and_position_only():
    draws = [sample(LOGITS, 1.0, 0, 1.0, 3, place) for place in range(50)]
    assert draws == [sample(LOGITS, 1.0, 0, 1.0, 3, place) for place in range(50)]
    assert draws != [sample(LOGITS, 1.0, 0, 1.0, 4, place) for place in range(50)]


def test_extreme_logits_are_drawn_without_overflow():
    logits = np.array([3e38, -3e38, 3e38], np.float32)
    assert {sample(logits, 1e-3, 0, 1.0, 0, place) for place in range(50)} == {0, 2}


def test_uniform_numbers_are_uniform_and_uncorrelated():
    numbers = np.array([[uniform(seed, place) for place in range(100)] for seed in range(50)])
    assert kstest(numbers.ravel(), "uniform").pvalue > 1e-4
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for one, other in ((numbers[:, :-1], numbers[:, 1:]), (numbers[:-1], numbers[1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def test_row_seeds_fit_int32_and_differ():
    seeds = [
        row_seed(seed, start, step)
        for seed in (0, 1, 2**63, 2**64 - 1)
        for start in range(0, 320, 16)
        for step in range(16)
    ]
    assert min(seeds) >= 0
    assert max(seeds) < 2**31
    assert len(set(seeds)) == len(seeds)
    assert np.mean([seed & 1 for seed in seeds]) == pytest.approx(0.5, abs=0.06)
    # written down, so that an answer stays what it was in the next version
    assert (row_seed(0, 0, 0), row_seed(7, 48, 3)) == (297876190, 2088992113)
