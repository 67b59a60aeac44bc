"""Cost of quantized weights in one layer's output: a random layer of each kind, released width.

    python -m benchmarks.layer_errors

Float32 arithmetic on weights as they are stored; the experts are 8 in place of 128, of the released
size each. Attention is measured too, although the default recipe keeps it in 16 bits.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.record import machine, today, write_results
from tests.support.sparse_checkpoint import full_config
from tests.support.torch_generation import load_towers
from twotower_contract.quantized import FORMATS
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import read_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.reference.towers import Call, empty_states, run_layer
from twotower_export.tiny.checkpoints import random_tensors, write_checkpoint

KINDS = {"M": "Mamba", "E": "experts", "*": "attention"}
TOKENS, EXPERTS, VOCABULARY = 256, 8, 1024


@torch.no_grad()
def layer_outputs(folder: Path) -> list[torch.Tensor]:
    """Return what each layer of a checkpoint's context tower adds to random hidden states."""
    towers = load_towers(folder)
    config, tower = towers.config, towers.context.context_tower
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn((1, TOKENS, config.hidden_size), generator=generator)
    ones = torch.ones(1, dtype=torch.int64)
    call = Call(TOKENS * ones, 0 * ones, ones.bool())
    states = empty_states(config, 1, TOKENS, torch.float32)
    return [
        run_layer(layer, index, hidden, call, states, {}) - hidden
        for index, layer in enumerate(tower.layers)
    ]


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """Return each format's root mean square error by layer kind, relative to the output's."""
    config = full_config(
        hybrid_override_pattern="".join(KINDS),
        num_hidden_layers=len(KINDS),
        n_routed_experts=EXPERTS,
        vocab_size=VOCABULARY,
    )
    write_checkpoint(folder / "bf16", config, random_tensors(config, seed=0))
    exact = layer_outputs(folder / "bf16")
    source = open_checkpoint(folder / "bf16")
    errors = {}
    for name in FORMATS:
        rules = folder / f"{name}.json"
        rules.write_text(json.dumps({"rules": [{"match": "*.layers.*", "format": name}]}))
        quantize_checkpoint(source, folder / name, read_recipe(source, rules))
        narrow = layer_outputs(folder / name)
        errors[name] = {
            kind: float((ours - right).square().mean().sqrt() / right.square().mean().sqrt())
            for kind, ours, right in zip(KINDS.values(), narrow, exact, strict=True)
        }
    return errors


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        errors = measure(Path(folder))
    lines = [
        "# Error of one quantized layer",
        "",
        f"`python -m benchmarks.layer_errors`, {today()}, {machine()}; normally distributed weights"
        f" of the released width, {EXPERTS} experts, {TOKENS} tokens. Root mean square of the error"
        " of the layer's output, relative to that of the output.",
        "",
        "| format | " + " | ".join(KINDS.values()) + " |",
        "|---|" + "---:|" * len(KINDS),
        *(
            f"| {name} | " + " | ".join(f"{error:.1%}" for error in row.values()) + " |"
            for name, row in errors.items()
        ),
    ]
    print("\n".join(lines))
    write_results("layer-errors", lines, {"machine": machine(), "errors": errors})


if __name__ == "__main__":
    main()
