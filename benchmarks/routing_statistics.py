"""Distinct experts per layer as a function of rows in a batch, from measured routing.

Input: the experts that each token of each denoiser call was routed to, recorded on the released
checkpoint by junze-eng/twotower-repro (arithmetic prompts, three generations, block size 16): an
.npz with `layer` [n], `forward` [n], `generation` [n] and `experts` [n, 16, 6]. Output: the table
that `twotower plan` ships.

    python -m benchmarks.routing_statistics moe_routing.npz \
        engines/twotower_engines/planning/data/routing_statistics.json

One row is a call as it was measured. More rows are made by uniting the experts of as many calls
drawn at random, layer by layer: what a batch of as many requests at random points of their blocks
would read. The three generations are alike, so that a batch of unlike requests reads more; the plan
prints uniform routing beside it as the other end.

The context tower was not recorded. It runs over decided blocks, and a block's tokens spread over
more experts the more of them are decided (28 experts when all is masked, 40 at the end), so the
half of each generation's calls with the most distinct experts stands for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twotower_contract.atomic import write_text

ROWS = (1, 2, 4, 8, 16, 32, 64)
NUM_EXPERTS = 128
DRAWS = 400
SEED = 20260601
Routing = npt.NDArray[np.uint8]  # [calls, layers, 16, 6]


def load(path: Path) -> tuple[Routing, npt.NDArray[np.int64], list[int]]:
    """Return the routing per call, the generation of each call, and the layers' indices."""
    file = np.load(path)
    layers = list(dict.fromkeys(file["layer"].tolist()))
    calls = len(file["layer"]) // len(layers)
    assert file["layer"].reshape(calls, -1).tolist() == [layers] * calls, "calls are not in order"
    experts = file["experts"].reshape(calls, len(layers), *file["experts"].shape[1:])
    return experts, file["generation"].reshape(calls, -1)[:, 0].astype(np.int64), layers


def distinct(experts: Routing) -> npt.NDArray[np.int64]:
    """Count distinct experts; [layers, tokens, k] -> [layers]."""
    layers = experts.shape[0]
    used = np.zeros((layers, NUM_EXPERTS), bool)
    used[np.arange(layers)[:, None], experts.reshape(layers, -1)] = True
    return used.sum(1)


def united(
    routing: Routing, rows: int, tokens: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Count distinct experts of random batches; returns [draws, layers]."""
    if rows == 1 and tokens == routing.shape[2]:
        return np.stack([distinct(call) for call in routing])
    counts = []
    for _ in range(DRAWS):
        calls = rng.choice(len(routing), rows, replace=False)
        picked = routing[calls]  # [rows, layers, 16, k]
        if tokens < routing.shape[2]:
            places = rng.integers(routing.shape[2], size=rows)
            picked = picked[np.arange(rows), :, places][:, :, None]
        by_layer = picked.swapaxes(0, 1)
        counts.append(distinct(by_layer.reshape(by_layer.shape[0], -1, by_layer.shape[-1])))
    return np.stack(counts)


def summary(counts: npt.NDArray[np.int64]) -> dict[str, object]:
    """Return mean, spread over calls and layers, and the mean of each layer."""
    return {
        "mean": round(float(counts.mean()), 2),
        "p5": float(np.percentile(counts, 5)),
        "p95": float(np.percentile(counts, 95)),
        "per_layer": [round(float(mean), 1) for mean in counts.mean(0)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("routing", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    routing, generation, layers = load(args.routing)
    rng = np.random.default_rng(SEED)
    per_call = np.stack([distinct(call) for call in routing])
    means = per_call.mean(1)
    decided = np.concatenate(
        [
            np.flatnonzero((generation == one) & (means >= np.median(means[generation == one])))
            for one in np.unique(generation)
        ]
    )
    tables = {
        "denoiser block": (routing, 16),
        "context block": (routing[decided], 16),
        "context token": (routing[decided], 1),
    }
    histogram = np.bincount(per_call.ravel(), minlength=NUM_EXPERTS + 1)
    result = {
        "format": "twotower-routing",
        "format_version": 1,
        "source": "junze-eng/twotower-repro: released checkpoint, denoiser tower, arithmetic "
        "prompts, 3 generations, 210 calls of 16 tokens, 23 MoE layers each",
        "method": "benchmarks/routing_statistics.py: rows beyond one unite the experts of calls "
        f"drawn at random ({DRAWS} draws, seed {SEED}); the context tower is stood for by the "
        "calls with the most decided blocks",
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": int(routing.shape[-1]),
        "calls": len(routing),
        "moe_layers": layers,
        "histogram": {
            "meaning": "how many (call, layer) pairs used so many distinct experts for 16 tokens",
            "counts": {str(n): int(c) for n, c in enumerate(histogram) if c},
        },
        "tables": {
            name: {
                "tokens_per_row": tokens,
                "calls": len(pool),
                "rows": {str(rows): summary(united(pool, rows, tokens, rng)) for rows in ROWS},
            }
            for name, (pool, tokens) in tables.items()
        },
    }
    text = json.dumps(result, indent=1)
    write_text(args.output, text + "\n")
    for name, table in result["tables"].items():  # type: ignore[attr-defined]
        print(f"{name:16}", {rows: one["mean"] for rows, one in table["rows"].items()})


if __name__ == "__main__":
    main()
