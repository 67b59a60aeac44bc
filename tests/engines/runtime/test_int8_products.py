"""Products in 8 bits: near those in float32, the same alone and in a batch, where asked for."""

from __future__ import annotations

import numpy as np
import pytest

from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime import int8_products, opening
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow
from twotower_engines.runtime.onnxruntime import OnnxRuntime


@pytest.fixture(scope="module")
def made(random_engines):
    return random_engines("ME*E", seed=5)


@pytest.fixture(scope="module")
def narrow(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_products, "REDUCED_FROM", 0)
        runtime = OnnxRuntime(made.engines, threads=1, int8=True)
    yield runtime
    runtime.close()


def logits(runtime, slot, ids):
    runtime.reset(slot)
    return runtime.extend([ExtendRow(slot, ids, logits=True)])[0]


def test_logits_are_near_and_not_those_of_float32(made, narrow):
    ids = np.random.default_rng(0).integers(4, 300, 40).astype(np.int32)
    exact, rounded = logits(made.runtime, 0, ids), logits(narrow, 0, ids)
    error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.2


def test_a_row_is_the_same_alone_and_in_a_batch(narrow):
    draw = np.random.default_rng(1)
    blocks = [np.full(8, 3, np.int32) for _ in range(3)]
    for slot in range(3):
        logits(narrow, slot, draw.integers(4, 300, 5 + 9 * slot).astype(np.int32))
        blocks[slot][: 2 * slot] = draw.integers(4, 300, 2 * slot)
    rows = [DenoiseRow(slot, block, 0.3, 4) for slot, block in enumerate(blocks)]
    for row, together in zip(rows, narrow.denoise(rows), strict=True):
        (alone,) = narrow.denoise([row])
        np.testing.assert_array_equal(alone.ids, together.ids)
        np.testing.assert_allclose(alone.confidence, together.confidence, rtol=1e-5)


def test_other_flavours_refuse_it(made, monkeypatch):
    monkeypatch.setattr(made.engines.build.__class__, "flavour", "tensorrt", raising=False)
    with pytest.raises(RuntimeLoadError, match=r"flavour tensorrt .* --int8 is for those of a CPU"):
        opening.open_runtime(made.engines, int8=True)
