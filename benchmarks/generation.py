"""Tokens per second from prompt to answer on this machine, as ratios in one run.

    python -m benchmarks.generation

The trained tiny checkpoint, held-out prompts, greedy, threshold 0.9, all on the CPU in float32:

- PyTorch: the towers, eager, one request at a time, as NVIDIA's reference loop works;
- autoregressive: our CPU flavour with the context tower alone, the other way to use these weights;
- mask diffusion: our CPU flavour, 1 to 16 requests in flight.

What bounds it here is the number of operators (some 600 small ones per denoiser call), not bytes or
arithmetic: the model has 1 MB. The full-size figures are the roofline's, see `twotower plan`.
Answers are compared between all ways before anything is timed.

A second table compares what weights are stored as, and products in 8 bits (`--int8`), for a model
of hidden size 512, 14 layers and the released vocabulary with random weights: one request, four
denoiser calls for each block, tokens per second of CPU time with one thread.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.denoiser_call import HIDDEN, PATTERN, VOCABULARY, context_ids, seconds
from benchmarks.record import machine, today, write_results
from tests.support import TWOTOWER
from tests.support.torch_generation import load_towers
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_contract.quantized import Format
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import Runtime
from twotower_engines.runtime.opening import open_runtime
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.reference.refinement import Rule, refine
from twotower_export.reference.towers import advance_states, empty_states
from twotower_export.tiny.checkpoints import write_random_checkpoint
from twotower_export.tiny.corpus import documents

NEW_TOKENS, BLOCK, STEPS, THRESHOLD = 96, 16, 16, 0.9
PROMPTS, PYTORCH_PROMPTS = 16, 4
REPEATS = 3
PYTORCH = "PyTorch eager, 1 in flight"
LARGER_FORMATS: tuple[Format, ...] = ("fp8", "int4")
Answers = list[list[int]]


def build(folder: Path) -> tuple[Path, EngineSet]:
    """Export and build the shipped checkpoint with the verbs that a user would call."""
    checkpoint, bundle, engines = (str(folder / n) for n in ("checkpoint", "bundle", "engines"))
    for verb in (
        ["tiny", checkpoint, "--pretrained"],
        ["export", checkpoint, bundle],
        ["build", bundle, "--sku", "cpu", engines, "--slots", "16"],
    ):
        command = [*TWOTOWER, *verb]
        subprocess.run(command, check=True, capture_output=True)
    return Path(checkpoint), open_engine_set(Path(engines))


def pytorch_answers(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> Callable[[], Answers]:
    """The reference loop: one request, one block, one step after the other."""
    torch.set_num_threads(1)  # its faster setting: two threads wait for each other at every op
    towers = load_towers(checkpoint)
    mask_id = towers.config.mask_token_id

    @torch.no_grad()
    def answer(prompt: Sequence[int]) -> list[int]:
        states = empty_states(towers.config, 1, len(prompt) + NEW_TOKENS, torch.float32)
        length, ids, pending = 0, [], list(prompt)
        while True:
            tokens, before = torch.tensor([len(pending)]), torch.tensor([length])
            _, new = towers.context(torch.tensor([pending]), tokens, before, states)
            states = advance_states(states, new, tokens, before)
            length += len(pending)
            if len(ids) >= NEW_TOKENS:
                return ids
            block = np.full(BLOCK, mask_id, np.int32)
            rows = [torch.tensor([value]) for value in (BLOCK, length, 1)]
            for step in range(STEPS):
                if not (block == mask_id).any():
                    break
                logits = towers.denoiser(torch.from_numpy(block[None]), *rows, states)[0].numpy()
                rule = Rule(threshold=THRESHOLD, steps_left=STEPS - step)
                block = refine(logits, block, rule, mask_id=mask_id).ids
            pending = block.tolist()
            ids += pending

    return lambda: [answer(prompt) for prompt in prompts]


def our_answers(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    slots: int,
    mode: str = "mask_diffusion",
    tokens: int = NEW_TOKENS,
    steps: int = STEPS,
) -> Callable[[], Answers]:
    """The CPU flavour with so many requests in flight."""

    def run() -> Answers:
        scheduler = Scheduler(runtime, slots)
        answers: dict[str, list[int]] = {}
        for number, prompt in enumerate(prompts):
            answers[str(number)] = []
            scheduler.submit(
                Request(
                    str(number),
                    tuple(prompt),
                    mode=mode,  # type: ignore[arg-type]
                    max_new_tokens=tokens,
                    steps=steps,
                    threshold=THRESHOLD,
                    ignore_eos=True,
                )
            )
        while not scheduler.idle:
            for event in scheduler.turn():
                answers[event.request_id] += event.ids
        return list(answers.values())

    return run


def best_seconds(runs: Sequence[Callable[[], Answers]]) -> list[float]:
    """The shortest of some repeats of each, taken in turns: noise hits all alike."""
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, engines = build(Path(folder))
        tokenizer = Tokenizer(engines.folder)
        held_out = documents("held_out", seed=0)
        prompts = [list(tokenizer.encode(next(held_out).prompt)) for _ in range(PROMPTS)]
        ways = {
            PYTORCH: pytorch_answers(checkpoint, prompts[:PYTORCH_PROMPTS]),
            "autoregressive, 1 in flight": our_answers(open_runtime(engines), prompts, 1, "ar"),
            **{
                f"mask diffusion, {slots} in flight": our_answers(
                    open_runtime(engines), prompts, slots
                )
                for slots in (1, 4, 16)
            },
        }
        expected = ways[PYTORCH]()
        for name, way in ways.items():
            if "diffusion" in name:
                same = way()[:PYTORCH_PROMPTS] == expected
                assert same, f"{name}: answers differ from PyTorch's"
        best = dict(zip(ways, best_seconds(list(ways.values())), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        report(best, precisions(Path(folder)))


def precisions(folder: Path) -> list[dict[str, Any]]:
    """Tokens per CPU second of a larger model by what its weights are stored as."""
    write_random_checkpoint(folder / "bf16", PATTERN, HIDDEN, 1, vocab_size=VOCABULARY)
    source = open_checkpoint(folder / "bf16")
    rows: list[dict[str, Any]] = []
    for stored in ("bf16", *LARGER_FORMATS):
        if stored != "bf16":
            recipe = default_recipe(source, stored, ())
            quantize_checkpoint(source, folder / stored, recipe)
        bundle, built = folder / f"{stored}-bundle", folder / f"{stored}-engines"
        write_bundle(open_checkpoint(folder / stored), bundle)
        engines = build_engines(bundle, built, BuildOptions(slots=1, context=512))[0]
        for int8 in (False, True):
            runtime = open_runtime(engines, threads=1, int8=int8)
            answer = our_answers(runtime, [context_ids().tolist()], 1, tokens=32, steps=4)
            least = min(seconds(answer) for _ in range(REPEATS))
            runtime.close()
            rows.append({"stored": stored, "int8": int8, "tokens_per_second": round(32 / least, 1)})
    return rows


def report(best: dict[str, float], larger: list[dict[str, Any]]) -> None:
    """Print the table and write it to `results/`."""
    rates = {
        way: NEW_TOKENS * (PYTORCH_PROMPTS if way == PYTORCH else PROMPTS) / one
        for way, one in best.items()
    }
    rows = [
        {"way": way, "tokens_per_second": round(rate), "ratio": round(rate / rates[PYTORCH], 2)}
        for way, rate in rates.items()
    ]
    where = machine()
    lines = [
        "# Generation on the CPU",
        "",
        f"`python -m benchmarks.generation`, {today()}, {where}; trained tiny checkpoint,"
        f" {PROMPTS} prompts ({PYTORCH_PROMPTS} for PyTorch), {NEW_TOKENS} tokens each, threshold"
        f" {THRESHOLD}, best of {REPEATS}.",
        "",
        "| way | tokens/s | against PyTorch |",
        "|---|---:|---:|",
        *(f"| {r['way']} | {r['tokens_per_second']} | {r['ratio']:.1f}x |" for r in rows),
        "",
        f"Hidden size {HIDDEN}, {len(PATTERN)} layers, vocabulary {VOCABULARY:,}, random weights,"
        " four calls for each block of 16, tokens per second of CPU time with one thread:",
        "",
        "| weights | products | tokens/s |",
        "|---|---|---:|",
        *(
            f"| {r['stored']} | {'int8' if r['int8'] else 'float32'} | {r['tokens_per_second']} |"
            for r in larger
        ),
    ]
    print("\n".join(lines))
    write_results("generation-cpu", lines, {"machine": where, "rows": rows, "larger": larger})


if __name__ == "__main__":
    main()
