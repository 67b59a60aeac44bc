"""Streamed towers: the numbers of those in memory, and the memory of one layer."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.support.sparse_checkpoint import FULL_CONFIG, write_sparse_checkpoint
from twotower_export.checkpoint import open_checkpoint
from twotower_export.reference.mapped import NamedTensors, load_tower
from twotower_export.reference.sequence import StreamedTowers
from twotower_export.reference.towers import advance_states
from twotower_export.tiny.checkpoints import write_random_checkpoint

TOWERS = ("context", "denoiser")

WIDE = FULL_CONFIG | {
    "hybrid_override_pattern": "EMEEEE*EEEEE",
    "num_hidden_layers": 12,
    "hidden_size": 1024,
    "vocab_size": 1024,
    "n_routed_experts": 64,
    "moe_intermediate_size": 2048,
}
"""Ten MoE layers of 537 MB in bf16, of which a call that routes to six experts touches 50 MB."""

MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from twotower_export.checkpoint import open_checkpoint
from twotower_export.reference import sequence
from twotower_export.reference.sequence import StreamedTowers

sequence._finite = lambda logits, tower: logits  # holes are zeros, which are refused otherwise

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

checkpoint = open_checkpoint(sys.argv[1])
before = status("VmRSS")
towers = StreamedTowers(checkpoint, 64)
towers.extend([5, 6, 7])
towers.denoise(np.full(16, 3, np.int32))
print(json.dumps({"peak": status("VmHWM") - before, "read": towers.bytes_read}))
"""


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0), ("float32", 1e-5)])
def test_streamed_logits_are_those_of_towers_in_memory(tmp_path, dtype, tolerance):
    """Bit for bit where both widen what is stored; mapped float32 lies at other alignments."""
    write_random_checkpoint(tmp_path / "checkpoint", "MEM*E", 32, seed=5, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    streamed = StreamedTowers(checkpoint, 40)
    tensors = NamedTensors(checkpoint.path)
    context, denoiser = (load_tower(checkpoint.config, one, tensors) for one in TOWERS)
    block = np.array([3, 9, 3, 3, 11, 3], np.int32)
    states, length = streamed.states, torch.tensor([0])
    for ids in ([5, 6, 7, 8, 9], [10], [11, 12, 13, 14]):
        given = torch.tensor([ids]), torch.tensor([len(ids)]), length
        logits, new = context(*given, states)
        states, length = advance_states(states, new, *given[1:]), length + len(ids)
        call = torch.from_numpy(block[None]), torch.tensor([len(block)]), length
        expected = [logits[0], denoiser(*call, torch.tensor([1]), states)[0]]
        found = streamed.extend(ids), streamed.denoise(block)
        for ours, theirs in zip(found, map(torch.Tensor.numpy, expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
    assert streamed.calls == 6
    assert streamed.length == 10


@pytest.mark.slow
def test_memory_is_that_of_one_layer_and_only_routed_experts_are_read(tmp_path):
    """Weights of 11 GB, made of holes; all scores are equal, so every token has the same experts.

    Mapped pages count as memory once they are touched: a layer that was read whole, or two layers
    that were kept, would show.
    """
    snapshot = write_sparse_checkpoint(tmp_path, WIDE)
    size = sum(path.stat().st_size for path in snapshot.glob("*.safetensors"))
    assert size > 10e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(snapshot)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    expert = 2 * 2 * WIDE["hidden_size"] * WIDE["moe_intermediate_size"]
    assert 2 * 10 * 6 * expert < measured["read"] < 0.2 * size
    assert measured["peak"] < 250e6, f"{measured['peak'] / 1e6:.0f} MB"
