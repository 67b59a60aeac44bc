"""`SparseExperts` with weights of 8 and 4 bits: the kernels, interpreted, against float64.

The codes are decoded by `ml_dtypes` here, which knows nothing of ours, and the instructions that
decode them on a GPU are carried out one by one for every byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

import tests.support.kernel_reference as reference
from tests.support import kernel_launches
from tests.support.kernel_inputs import draw_experts
from tests.support.quantized_banks import draw_bank
from twotower_engines.errors import BuildError
from twotower_engines.kernels import expert_products, quantized


@pytest.mark.parametrize("tactic", [1, 3])
@pytest.mark.parametrize(
    ("form", "hidden", "inner", "group"),
    [
        ("fp8", 144, 80, 16),
        ("nvfp4", 144, 80, 16),  # 144 = 128 + 16: one group in the last step
        ("int4", 192, 64, 64),
        ("int4", 160, 96, 32),
        ("int4", 128, 256, 128),
    ],
)
def test_banks(form: str, hidden: int, inner: int, group: int, tactic: int) -> None:
    generator = np.random.default_rng(hidden + inner)
    x, indices, weights, _, _ = draw_experts(generator, 12, 2, 4, hidden, inner, torch.bfloat16)
    indices[3, 1] = -1
    up, exact_up = draw_bank(generator, form, (4, inner, hidden), group)
    down, exact_down = draw_bank(generator, form, (4, hidden, inner), group)
    tiles = expert_products.matmul_tactics("bf16", form, group)[tactic - 1]
    got = kernel_launches.sparse_experts(x, indices, weights, up, down, tiles)
    want = reference.sparse_experts(
        x.double().numpy(), indices.numpy(), weights.numpy(), exact_up, exact_down, "bf16"
    )
    assert np.linalg.norm(want) > 0
    assert np.linalg.norm(got.double().numpy() - want) < 4e-3 * np.linalg.norm(want)


def test_groups_that_no_kernel_has_are_refused() -> None:
    with pytest.raises(BuildError, match=r"up projection: 2 scales for 512 weights of int4"):
        expert_products.bank_constants("up", "int4", 512, 2)


def carried_out(asm: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Run PTX on vectors of 32-bit registers; returns the outputs $0, $1 and so on.

    Only the instructions that `quantized` uses, each by PTX's own definition.
    """
    count = max(int(n) for n in re.findall(r"\$(\d+)", asm)) + 1
    registers = {f"${count - len(inputs) + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> np.ndarray:
        if name in registers:
            return registers[name]
        return np.broadcast_to(np.uint32(int(name, 0)), inputs[0].shape)

    def halves(word: np.ndarray) -> np.ndarray:
        return word[..., None].view(np.uint16).view(ml_dtypes.bfloat16)

    def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        exact = [halves(np.ascontiguousarray(word)).astype(np.float64) for word in (a, b, c)]
        made = (exact[0] * exact[1] + exact[2]).astype(ml_dtypes.bfloat16)  # exact, then rounded
        return np.ascontiguousarray(made).view(np.uint32)[..., 0]

    def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        pool = (b.astype(np.uint64) << 32) | a
        made = np.zeros_like(a)
        for byte in range(4):
            which = (selector >> (4 * byte)) & 0xF
            assert (which < 8).all(), "no sign replication"
            taken = (pool >> (8 * which).astype(np.uint64)) & 0xFF
            made |= (taken << (8 * byte)).astype(np.uint32)
        return made

    def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        assert (table == 0xEA).all()
        return (a & b) | c

    operations: dict[str, Callable[..., np.ndarray]] = {
        "mov.b32": lambda a: a,
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "shr.u32": np.right_shift,
        "mul.lo.u32": lambda a, b: (a.astype(np.uint64) * b).astype(np.uint32),
        "lop3.b32": lop3,
        "prmt.b32": prmt,
        "fma.rn.bf16x2": fma,
    }
    for line in asm.strip("{}\n").splitlines():
        operation, _, rest = line.strip().rstrip(";").partition(" ")
        if operation != ".reg":
            target, *given = (part.strip() for part in rest.split(","))
            registers[target] = operations[operation](*map(value, given))
    return [registers[f"${i}"] for i in range(count - len(inputs))]


def in_place(codes: np.ndarray) -> np.ndarray:
    """Four bytes to a register."""
    return np.ascontiguousarray(codes).view(np.uint32)[..., 0]


def bf16_pairs(registers: list[np.ndarray]) -> np.ndarray:
    """Elements of registers of two bf16 each, in order."""
    words = np.ascontiguousarray(np.stack(registers, axis=-1))
    return words.view(ml_dtypes.bfloat16).astype(np.float64)


ALL_BYTES = np.stack([np.roll(np.arange(256), k) for k in (0, 1, 77, 200)], axis=-1).astype(
    np.uint8
)
"""[256, 4]: every byte at each of the four places."""


def test_the_instructions_for_e4m3() -> None:
    got = bf16_pairs(carried_out(quantized.E4M3.value, [in_place(ALL_BYTES)]))
    want = ALL_BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    real = (ALL_BYTES & 0x7F) != 0x7F
    np.testing.assert_array_equal(got[real], want[real])
    assert (np.signbit(got) == (ALL_BYTES >= 128)).all()


@pytest.mark.parametrize("form", ["int4", "nvfp4"])
def test_the_instructions_for_two_codes_of_a_byte(form: str) -> None:
    asm = quantized.INT4 if form == "int4" else quantized.E2M1
    codes = np.stack([ALL_BYTES & 15, ALL_BYTES >> 4])
    for scale in (1.0, 0.0123, 448.0, 2.0**-9):
        rounded = np.float64(np.asarray(scale, dtype=ml_dtypes.bfloat16))
        given = rounded if form == "int4" else rounded * 2.0**118
        bits = np.asarray(given, dtype=ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
        pair = np.full(256, bits | (bits << 16), dtype=np.uint32)
        made = carried_out(asm.value, [in_place(ALL_BYTES), pair, pair])
        low, high = bf16_pairs(made[:2]), bf16_pairs(made[2:])
        if form == "int4":
            want = (codes.astype(np.float64) - 8) * rounded
        else:
            want = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
            want *= rounded * quantized.SHRUNK.value
        want = want.astype(ml_dtypes.bfloat16).astype(np.float64)
        np.testing.assert_array_equal(np.stack([low, high]), want)
