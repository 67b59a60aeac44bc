"""One denoiser call of a model of hidden size 512 on this CPU, against the towers in PyTorch.

    python -m benchmarks.denoiser_call

14 layers, the released vocabulary of 131,072, random weights; two choices of experts. All in
float32, one request, a block of 16 tokens of which 10 are masked, behind a context of 64:

- PyTorch: the reference towers, eager, which compute only the routed experts
  (`reference.mixers.SparseExperts`), and the refinement step of `benchmarks.eager`;
- ours: a call of the CPU flavour, from ids to ids; and the refinement step on its own, as
  it is in that call, from the logits of the masked positions on.

Once with one thread each, in CPU time of the process, so that other processes of the machine count
little; once as each of them runs by default, with a thread per core, in time on the wall, where
PyTorch may also take one thread if that is faster. Times are the least of many repeats in turns.
Both must commit the same tokens.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

from benchmarks.eager import refine_block
from benchmarks.record import machine, today, write_results
from tests.support.torch_generation import load_towers
from twotower_contract.engine_set import EngineSet
from twotower_contract.machine import cores
from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.runtime.host_states import Batch, Slot
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.runtime.pruning import flat_graph, prune
from twotower_engines.runtime.vocabulary_passes import refine_masked_rows
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.reference.towers import advance_states, empty_states
from twotower_export.tiny.checkpoints import write_random_checkpoint

PATTERN, HIDDEN, VOCABULARY = "MEM*EMEM*EMEM*", 512, 131_072
MODELS: Mapping[str, dict[str, int]] = {
    "8 experts of 512, 2 per token": {},
    "64 experts of 352, 6 per token": {
        "num_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 352,
    },
}
CONTEXT, BLOCK, KNOWN, MASK, THRESHOLD = 64, 16, 6, 3, 0.9
REPEATS = 25
ROWS, LONG_CONTEXT = 16, 3840


def build(folder: Path, sizes: Mapping[str, int]) -> EngineSet:
    """Write a random checkpoint and build its engines for the CPU."""
    write_random_checkpoint(
        folder / "checkpoint", PATTERN, HIDDEN, 1, vocab_size=VOCABULARY, **sizes
    )
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    options = BuildOptions(slots=1, context=512)
    return build_engines(folder / "bundle", folder / "engines", options)[0]


def memory(key: str) -> float:
    """Return an entry of this process's memory in GB: `RssAnon`, `VmRSS` or `VmHWM`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1e6
    raise KeyError(key)


def refinement(engines: EngineSet) -> Callable[[np.ndarray], Callable[[], Any]]:
    """Return the step alone, as the denoiser's session has it: logits, then a call."""
    outputs = ["new_ids", "still_masked", "confidence"]
    model = flat_graph(engines.engine_path("denoiser"))
    prune(model.graph, outputs)
    model = refine_masked_rows(model, "every", VOCABULARY, MASK)
    head = next(node for node in model.graph.node if "lm_head.weight" in node.input)
    model.graph.node.remove(head)
    shape = ["masked", VOCABULARY]
    value = helper.make_tensor_value_info(head.output[0], TensorProto.FLOAT, shape)
    model.graph.input.append(value)
    model.graph.input.append(helper.make_tensor_value_info("every", TensorProto.BOOL, [1]))
    prune(model.graph, outputs)
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    rows = {"lengths": BLOCK, "steps_left": BLOCK, "policy": 0, "seed": 0}
    inputs = {name: np.array([value], np.int32) for name, value in rows.items()}
    inputs |= {"threshold": np.array([THRESHOLD], np.float32)}
    inputs |= {"temperature": np.zeros(1, np.float32)}
    inputs |= {"every": np.zeros(1, np.bool_), "ids": block_ids()[None]}

    def on(logits: np.ndarray) -> Callable[[], Any]:
        masked = np.ascontiguousarray(logits[block_ids()[None] == MASK])
        return lambda: session.run(None, inputs | {head.output[0]: masked})

    return on


def context_ids() -> np.ndarray:
    return np.random.default_rng(0).integers(4, VOCABULARY, CONTEXT).astype(np.int32)


def block_ids() -> np.ndarray:
    block = np.full(BLOCK, MASK, np.int32)
    block[:KNOWN] = context_ids()[:KNOWN]
    return block


@torch.no_grad()
def measure(folder: Path, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return milliseconds of each way, and the memory that loading ours took in GB."""
    engines = build(folder, sizes)
    before, all_before = memory("RssAnon"), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    runtime = OnnxRuntime(engines, threads=1)
    weights = engines.manifest.weights
    shapes = [weight.shape for tower in weights.values() for weight in tower.values()]
    made = {
        "weights_gb": sum(4 * math.prod(shape) for shape in shapes) / 1e9,
        "resident_gb": memory("RssAnon") - before,
        "peak_gb": memory("VmHWM") - all_before,
    }
    tower, refine, logits = pytorch(folder / "checkpoint")
    expected = refine()[0][0].numpy()
    step = refinement(engines)(logits.numpy())
    assert (step()[0][0] == expected).all(), "the refinement step's tokens differ"
    ways: dict[str, Callable[[], Any]] = {
        "pytorch_tower": tower,
        "pytorch_refinement": refine,
        "call": checked_call(runtime, expected),
        "refinement": step,
    }
    torch.set_num_threads(1)
    made |= best_milliseconds(ways, time.process_time)
    made |= copying(runtime)
    runtime.close()

    runtime = OnnxRuntime(engines)
    call = {"call": checked_call(runtime, expected)}
    of_pytorch = {"pytorch": lambda: (tower(), refine())}
    for threads in {1, cores()}:
        torch.set_num_threads(threads)
        wall = best_milliseconds(of_pytorch | call, time.perf_counter)
        for name, least in wall.items():
            made[f"{name}_wall"] = min(made.get(f"{name}_wall", math.inf), least)
    runtime.close()
    return made


def pytorch(
    checkpoint: Path,
) -> tuple[Callable[[], torch.Tensor], Callable[[], Any], torch.Tensor]:
    """Return a call of the denoiser tower and a refinement step, and the logits between them."""
    towers = load_towers(checkpoint)
    tokens, none, one = (torch.tensor([count]) for count in (CONTEXT, 0, 1))
    states = empty_states(towers.config, 1, 2 * CONTEXT, torch.float32)
    _, new = towers.context(torch.from_numpy(context_ids()[None]), tokens, none, states)
    states = advance_states(states, new, tokens, none)
    ids, size = torch.from_numpy(block_ids()[None]), torch.tensor([BLOCK])

    def tower() -> torch.Tensor:
        made: torch.Tensor = towers.denoiser(ids, size, tokens, one, states)
        return made

    logits, threshold = tower(), torch.tensor([THRESHOLD])
    return tower, lambda: refine_block(logits, ids, size, threshold, size, MASK), logits


def checked_call(runtime: OnnxRuntime, expected: np.ndarray) -> Callable[[], Any]:
    """Return a call of the denoiser behind the context, once it has committed what is expected."""
    runtime.extend([ExtendRow(0, context_ids())])
    row = DenoiseRow(0, block_ids(), THRESHOLD, BLOCK)
    assert (runtime.denoise([row])[0].ids == expected).all(), "our tokens differ from PyTorch's"
    return lambda: runtime.denoise([row])


def copying(runtime: OnnxRuntime) -> dict[str, float]:
    """Return CPU milliseconds of bringing the states of many rows together for a call.

    Returns:
        `all_states`: all are copied; `after_a_block`: one row was extended by a block since the
        call before.
    """
    shapes = runtime.state_shapes
    slots = [
        Slot(LONG_CONTEXT, shapes.empty(1, LONG_CONTEXT + ROWS * BLOCK), None) for _ in range(ROWS)
    ]
    for slot in slots:
        for array in (*slot.states.mamba, slot.states.caches):
            array[:] = 1  # so that its pages are there
    batch = Batch(ROWS, shapes)

    def anew() -> None:
        nonlocal batch
        batch = Batch(ROWS, shapes)
        batch.take(slots, BLOCK)

    def after_a_block() -> None:
        slots[7].length += BLOCK
        batch.take(slots, BLOCK)

    least = dict.fromkeys(("all_states", "after_a_block"), math.inf)
    for _ in range(3):
        for slot in slots:
            slot.length = LONG_CONTEXT
        for name, run in (("all_states", anew), *[("after_a_block", after_a_block)] * 3):
            least[name] = min(least[name], seconds(run))
    return {name: 1000 * one for name, one in least.items()}


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    """Return what a call takes of a clock; the process's CPU time where none is given."""
    start = clock()
    run()
    return clock() - start


def best_milliseconds(
    ways: Mapping[str, Callable[[], Any]], clock: Callable[[], float]
) -> dict[str, float]:
    """Return the least time of some repeats of each, taken in turns."""
    best = dict.fromkeys(ways, math.inf)
    for _ in range(REPEATS):
        for name, run in ways.items():
            best[name] = min(best[name], 1000 * seconds(run, clock))
    return best


def main() -> None:
    rows = []
    for name, sizes in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), sizes)
        pytorch = found["pytorch_tower"] + found["pytorch_refinement"]
        ratios = {
            "ratio": pytorch / found["call"],
            "ratio_wall": found["pytorch_wall"] / found["call_wall"],
            "refinement_share": found["refinement"] / found["call"],
        }
        rows.append({"model": name} | {key: round(v, 3) for key, v in (found | ratios).items()})
    report(rows)


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table and write it to `results/`."""
    where = machine()
    lines = [
        "# A denoiser call on the CPU",
        "",
        f"`python -m benchmarks.denoiser_call`, {today()}, {where}; hidden size {HIDDEN},"
        f" {len(PATTERN)} layers, vocabulary {VOCABULARY:,}, one request, least of {REPEATS}.",
        "",
        "As each runs by default, with a thread per core, milliseconds on the wall; PyTorch with"
        " one thread where that is faster:",
        "",
        "| model | PyTorch eager, routed experts only | ours | ratio |",
        "|---|---:|---:|---:|",
        *(
            f"| {r['model']} | {r['pytorch_wall']:.1f} | {r['call_wall']:.1f}"
            f" | {r['ratio_wall']:.2f}x |"
            for r in rows
        ),
        "",
        "CPU milliseconds with one thread, the denoiser tower + the refinement step:",
        "",
        "| model | PyTorch eager, routed experts only | ours | ratio | refinement in it |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {r['model']} | {r['pytorch_tower']:.1f} + {r['pytorch_refinement']:.1f}"
            f" | {r['call']:.1f} | {r['ratio']:.2f}x"
            f" | {r['refinement']:.1f}, {100 * r['refinement_share']:.1f}% |"
            for r in rows
        ),
        "",
        f"CPU milliseconds that the states of {ROWS} rows x {LONG_CONTEXT:,} tokens take before a"
        f" call: {rows[0]['all_states']:.0f} where all are copied,"
        f" {rows[0]['after_a_block']:.1f} where one row has grown by a block since the last call.",
        "",
        "GB of memory that loading both towers takes, beside their float32 weights; the peak counts"
        " pages of the checkpoint's files as well:",
        "",
        "| model | weights | resident after loading | peak while loading |",
        "|---|---:|---:|---:|",
        *(
            f"| {r['model']} | {r['weights_gb']:.2f} | {r['resident_gb']:.2f}"
            f" | {r['peak_gb']:.2f} |"
            for r in rows
        ),
    ]
    print("\n".join(lines))
    write_results("denoiser-call-cpu", lines, {"machine": where, "rows": rows})


if __name__ == "__main__":
    main()
