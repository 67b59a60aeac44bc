"""The kernels compiled and run on a GPU, at the released model's sizes; prints errors as JSON.

A process of its own, because the other tests here run the kernels in the interpreter:

    python -m tests.support.gpu_checks refine|experts|quantized|mamba|plugins

References are float64: NumPy's where they are quick enough, PyTorch's on the GPU otherwise.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import tests.support.kernel_reference as reference
from benchmarks import eager
from benchmarks.kernel_cases import CASES, routed
from tests.support import kernel_launches
from tests.support.kernel_inputs import (
    MASK,
    block,
    draw_experts,
    draw_mamba,
    draw_router,
    layer_of_experts,
    mixed_rows,
    row_tensors,
)
from tests.support.plugin_launches import Launcher
from tests.support.quantized_banks import as_given, draw_bank
from twotower_engines.kernels import expert_products, linear, mamba_spans, router
from twotower_engines.kernels.nodes import OPS, STATES
from twotower_engines.kernels.spec import Sizes
from twotower_engines.kernels.targets import target

SIZES = Sizes()


def to_gpu(tensors: Any) -> list[Any]:
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in tensors]


def relative(got: torch.Tensor, want: Any) -> float:
    """Norm of the error over the norm of the reference, in float64 on the CPU."""
    exact = torch.as_tensor(want).double().cpu()
    return float((got.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30))


def same(first: Any, second: Any) -> bool:
    """Whether two runs gave the same bits."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


def check_refine() -> dict[str, Any]:
    """All policies, noise and ragged rows; then the full vocabulary against PyTorch in float64."""
    generator = np.random.default_rng(1)
    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.from_numpy(generator.normal(0, 3, (10, 16, 9001))).to(dtype)
        ids = block(generator, 10, 16, 9001, 0.7).astype(np.int32)
        rows = mixed_rows(generator, 10, 16)
        given = to_gpu([logits, torch.from_numpy(ids), *row_tensors(rows)])
        got = [x.cpu().numpy() for x in kernel_launches.refine_block(*given, MASK)]
        for b, row in enumerate(rows):
            want = reference.refine_row(logits[b].double().numpy(), ids[b], row, MASK)
            wrong += int((got[0][b] != want[0]).sum() + (got[2][b] != want[2]).sum())
            wrong += int(got[3][b] != want[3])

    B, S, V = 4, 16, SIZES.vocab_size
    logits = torch.randn(B, S, V, device="cuda", dtype=torch.float32) * 4
    logits[2, 5, 77] = torch.nan
    ids = torch.full((B, S), MASK, dtype=torch.int32, device="cuda")
    rows = mixed_rows(generator, B, S)
    for row in rows:
        row.policy, row.temperature, row.threshold, row.length = 0, 0.0, 0.5, S
    lengths, threshold, steps, *rest = to_gpu(row_tensors(rows))
    got = kernel_launches.refine_block(logits, ids, lengths, threshold, steps, *rest, MASK)
    again = kernel_launches.refine_block(logits, ids, lengths, threshold, steps, *rest, MASK)
    want = eager.refine_block(logits, ids, lengths, threshold, steps, MASK)
    good = torch.tensor([0, 1, 3], device="cuda")
    return {
        "wrong": wrong,
        "full_size_wrong": sum(int((got[i] != want[i]).sum()) for i in (0, 2, 3)),
        "confidence": relative(got[1][good], want[1][good]),
        "failed_row": int(got[3][2]),
        "same": same([x.nan_to_num() for x in got], [x.nan_to_num() for x in again]),
    }


def check_experts() -> dict[str, Any]:
    """Small float32, then full-size banks at 1, 16, 64 and 1024 tokens."""
    small = draw_experts(np.random.default_rng(2), 40, 2, 8, 96, 80)
    got = kernel_launches.sparse_experts(*to_gpu(small))
    exact = [x.double().numpy() for x in small]
    exact[1] = small[1].numpy()
    errors = {"float32": relative(got, reference.sparse_experts(*exact, "fp32"))}
    shape = (SIZES.experts, SIZES.inner, SIZES.hidden)
    up = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, SIZES.hidden**-0.5)
    down = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(0, SIZES.inner**-0.5)
    down = down.view(SIZES.experts, SIZES.hidden, SIZES.inner)
    equal = True
    for tokens, used in ((1, 6), (16, 34), (64, 71), (1024, 118)):
        x = torch.randn(tokens, SIZES.hidden, device="cuda").bfloat16()
        indices = routed(tokens, used, SIZES).cuda()
        indices[tokens // 2, 1] = -1
        weights = torch.rand(tokens, SIZES.experts_per_token, device="cuda")
        got = kernel_launches.sparse_experts(x, indices, weights, up, down)
        equal = equal and torch.equal(
            got, kernel_launches.sparse_experts(x, indices, weights, up, down)
        )
        some = range(0, tokens, max(1, tokens // 16))
        want = torch.zeros(len(some), SIZES.hidden, device="cuda", dtype=torch.float64)
        for place, n in enumerate(some):
            for k in range(SIZES.experts_per_token):
                e = int(indices[n, k])
                if e >= 0:
                    inner = torch.relu(up[e].double() @ x[n].double()).bfloat16()
                    inner = inner.double().square().bfloat16().double()
                    want[place] += weights[n, k].double() * (down[e].double() @ inner)
        errors[f"{tokens} tokens"] = relative(got[list(some)], want)
    return {"errors": errors, "same": equal}


def check_quantized() -> dict[str, Any]:
    """Banks of 8 and 4 bits in every tactic: what a GPU's own instructions make of the codes."""
    generator = np.random.default_rng(4)
    errors = {}
    for form, group in (("fp8", 16), ("int4", 64), ("int4", 32), ("nvfp4", 16)):
        x, indices, weights, _, _ = draw_experts(generator, 40, 2, 8, 448, 192, torch.bfloat16)
        up, exact_up = draw_bank(generator, form, (8, 192, 448), group)
        down, exact_down = draw_bank(generator, form, (8, 448, 192), group)
        exact = (x.double().numpy(), indices.numpy(), weights.numpy(), exact_up, exact_down)
        want = reference.sparse_experts(*exact, "bf16")
        banks = [replace(bank, **on_gpu(bank)) for bank in (up, down)]
        for tactic, tiles in enumerate(expert_products.matmul_tactics("bf16", form), 1):
            got = kernel_launches.sparse_experts(*to_gpu([x, indices, weights]), *banks, tiles)
            errors[f"{form} groups of {group}, tactic {tactic}"] = relative(got, want)
    return {"errors": errors}


def on_gpu(bank: kernel_launches.Bank) -> dict[str, Any]:
    """A bank's tensors there."""
    (codes, scale, scale_2) = to_gpu([bank.codes, bank.scale, bank.scale_2])
    return {"codes": codes, "scale": scale, "scale_2": scale_2}


def check_mamba() -> dict[str, Any]:
    """Full-size heads: denoise steps, and calls of several chunks, with large seeds."""
    generator = np.random.default_rng(3)
    sizes = (SIZES.heads, SIZES.head_dim, SIZES.state, SIZES.groups)
    errors, equal = {}, True
    for dtype in (torch.float32, torch.bfloat16):
        name = "fp32" if dtype == torch.float32 else "bf16"
        for L, lengths in ((16, [16, 9, 0]), (300, [300, 133])):
            args = draw_mamba(generator, L, lengths, dtype, sizes=sizes, seed_scale=30.0)
            exact = [x.double().numpy() for x in args]
            want = reference.mamba_block_step(*exact, SIZES.groups, 1e-5, name)
            given = to_gpu(args)
            got = kernel_launches.mamba_block_step(*given, SIZES.groups, 1e-5)
            equal = equal and same(
                got, kernel_launches.mamba_block_step(*given, SIZES.groups, 1e-5)
            )
            without = kernel_launches.mamba_block_step(*given, SIZES.groups, 1e-5, states=False)
            errors[f"{name} {L} y without states"] = relative(without[0], want[0])
            again = kernel_launches.mamba_block_step(*given, SIZES.groups, 1e-5, states=False)
            equal = equal and torch.equal(without[0], again[0])
            tactics = range(1, mamba_spans.TACTICS + 1)
            for tactic in tactics:
                got = kernel_launches.mamba_block_step(*given, SIZES.groups, 1e-5, tactic=tactic)
                for part, mine, theirs in zip(("y", "conv", "state"), got, want, strict=True):
                    errors[f"{name} {L} tactic {tactic} {part}"] = relative(mine, theirs)
    return {"errors": errors, "same": equal}


def check_plugins() -> dict[str, Any]:
    """Every plugin's PTX by the driver's API, as TensorRT launches it, at the released sizes.

    Errors are against PyTorch in float32; `same` is whether the op's own launcher, with the same
    tiles, gives the same bits.
    """
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability()
    stream = torch.cuda.current_stream().cuda_stream
    launcher = Launcher(driver, target(f"{major}.{minor}"), stream)
    errors: dict[str, float] = {}
    equal: dict[str, bool] = {}
    plain = [name for name in CASES if name != "codes"]
    bf16 = [case for name in plain for case in CASES[name]("cuda") if "fp32" not in case.shape]
    for case in bf16:
        if not re.match(r"B=[14] |(16|256) tokens", case.shape):
            continue
        inputs = case.inputs()
        states = "new states" in case.shape
        given, attributes = op_call(case.op, inputs)
        op = f"{case.op}{STATES}" if states else case.op
        for tactic in range(1, max(node.tactics for node in OPS[op].chain) + 1):
            name = f"{case.op} {case.shape}" + (f" tactic {tactic}" if tactic > 1 else "")
            made = launcher.run_chain(op, given, attributes, tactic)
            torch.cuda.synchronize()
            got = [made[output] for output in OPS[case.op].outputs]
            if case.op == "SparseExperts":
                tiles = expert_products.matmul_tactics("bf16")[tactic - 1]
                want: Any = (kernel_launches.sparse_experts(*inputs, config=tiles),)
            elif states:
                want = kernel_launches.mamba_block_step(*inputs, tactic=tactic)
            else:
                want = case.kernel(*inputs)
            wanted = 3 if states else 4 if case.op == "RefineBlock" else 1
            equal[name] = same(got[:wanted], want[:wanted])
            if case.baseline:
                wide = [x.float() if is_bf16(x) else x for x in inputs]
                exact = case.baseline(*wide)
                exact = exact[case.compared] if isinstance(exact, tuple) else exact
                errors[name] = relative(got[case.compared], exact)
    drawn = draw_router(np.random.default_rng(8), [16] * 5, 16, 128, 2688, torch.bfloat16)
    chosen = {"per_token": 6, "normalized": 1, "scaling": 2.5}
    for tactic in range(1, len(router.TACTICS) + 1):
        made = launcher.run_chain("Router", to_gpu(drawn), chosen, tactic)
        torch.cuda.synchronize()
        scores = torch.sigmoid(drawn[0].double().flatten(0, 1) @ drawn[1].double().T)
        best = (scores + drawn[2].double()).topk(6).indices
        weights = scores.gather(1, best)
        wanted = 2.5 * weights / weights.sum(dim=1, keepdim=True)
        name = f"Router tactic {tactic}"
        equal[name] = torch.equal(made["indices"].long().cpu(), best)
        errors[name] = relative(made["weights"], wanted)
    for form, group in (("int4", 64), ("nvfp4", 16)):
        generator = np.random.default_rng(7)
        bank, exact = draw_bank(generator, form, (1, 1200, 2688), group)
        tensors = [one[0] for one in to_gpu(as_given(bank))]
        x = torch.from_numpy(generator.normal(0, 1, (40, 2688))).bfloat16().cuda()
        for tactic in range(1, linear.TACTICS + 1):
            made = launcher.run_chain(f"Linear{form.upper()}", [x, *tensors], {}, tactic)["y"]
            torch.cuda.synchronize()
            wanted = x.double().cpu().numpy() @ exact[0].T
            errors[f"Linear{form.upper()} tactic {tactic}"] = relative(made, wanted)
    return {"errors": errors, "same": equal}


def is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def op_call(op: str, inputs: tuple[Any, ...]) -> tuple[list[Any], dict[str, Any]]:
    """Tensors and attributes of an op, from its launcher's arguments."""
    count = len(OPS[op].inputs)
    tensors, rest = list(inputs[:count]), inputs[count:]
    if op == "RefineBlock":
        return tensors, {"mask_id": rest[0]}
    if op == "SparseExperts":
        given = layer_of_experts(inputs, 1)
        return given, {"num_experts": SIZES.experts, "gated": 1}
    return tensors, {"n_groups": rest[0], "epsilon": rest[1]}


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns
    checks = (check_refine, check_experts, check_quantized, check_mamba, check_plugins)
    print(json.dumps({f.__name__: f for f in checks}[f"check_{sys.argv[1]}"]()))
