"""Kernels compiled ahead of time: PTX for every GPU, without one.

Compilation needs a process without the interpreter, so each check starts its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from twotower_engines.errors import BuildError
from twotower_engines.kernels.compile import all_specs, compile_kernel
from twotower_engines.kernels.jit import SHARED_MEMORY_LIMIT
from twotower_engines.kernels.spec import Sizes
from twotower_engines.kernels.targets import TARGETS, target

KINDS = ("8.0", "9.0", "12.0")
"""The oldest GPU, the one with instructions of its own, and a new one; the others at night."""

OTHERS = [gpu.compute_capability for gpu in TARGETS if gpu.compute_capability not in KINDS]

SMALL = """
from twotower_engines.kernels.spec import Sizes
sizes = Sizes(vocab_size=261, hidden=64, inner=64, experts=8, experts_per_token=2, heads=2,
              head_dim=64, state=128, groups=1, small_dtype="fp32")
"""
"""Small constants, with the released model's tiles."""

COMPILE = """
import json
from dataclasses import replace
from twotower_engines.kernels.compile import all_specs, compile_kernel
from twotower_engines.kernels.expert_products import product_specs
from twotower_engines.kernels.linear import linear_specs
from twotower_engines.kernels.targets import target
made = []
codes = [product_specs(replace(sizes, experts_format=form))[0] for form in {forms!r}]
codes += linear_specs(64, 64, "nvfp4", 4)[:1]
for name in {targets!r}:
    for spec in [*all_specs(sizes), *(codes if name in ("8.0", "9.0") else [])]:
        compiled = compile_kernel(spec, target(name))
        made.append(dict(
            kernel=spec.name, target=name, ptx=compiled.ptx, entry=compiled.entry,
            version=compiled.ptx_version, shared=compiled.shared_memory,
            tokens=spec.launch.constants.get("BLOCK_T"),
            parameters=len(spec.types), types=list(spec.types.values()),
            arranged=compiled.arranged([None, *reversed(spec.types), None]),
        ))
print(json.dumps(made))
"""


def check_ptx(made: dict[str, Any]) -> None:
    """PTX that the oldest driver takes, with the kernel's own parameters and no more."""
    gpu = target(made["target"])
    assert made["version"] == f"{gpu.ptx // 10}.{gpu.ptx % 10}"
    stated = re.search(rf"^\.target (sm_{gpu.arch}a?)$", made["ptx"], re.MULTILINE)
    assert stated is not None
    if gpu.arch == 90:  # what has no wgmma is for later GPUs too
        assert stated[1].endswith("a") == ("wgmma" in made["ptx"])
    assert "/work" not in made["ptx"], "a path of this machine"
    assert "site-packages" not in made["ptx"]
    assert parameters(made["ptx"], made["entry"]) == made["types"]
    assert made["shared"] <= SHARED_MEMORY_LIMIT
    moved = parameters(made["arranged"], made["entry"])
    assert moved == ["*", *reversed(made["types"]), "*"]


def parameters(ptx: str, entry: str) -> list[str]:
    found = re.search(rf"\.visible \.entry {entry}\((.*?)\n\)", ptx, re.DOTALL)
    assert found
    return ["i32" if ".u32" in line else "*" for line in found.group(1).strip().splitlines()]


@pytest.mark.parametrize(
    "names",
    [
        *(pytest.param([name], marks=[] if name == "9.0" else pytest.mark.slow) for name in KINDS),
        pytest.param(OTHERS, marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
    ids=" ".join,
)
def test_every_kernel_compiles_for_every_gpu(
    compiled: Callable[..., Any], names: list[str]
) -> None:
    forms = ("fp8", "int4", "nvfp4")  # one kernel each, the slow test has them all
    found = compiled(SMALL + COMPILE.format(targets=names, forms=forms))
    old_and_hopper = len({"8.0", "9.0"} & set(names))
    assert len(found) == len(names) * len(all_specs(Sizes())) + (len(forms) + 1) * old_and_hopper
    assert {made["tokens"] for made in found} >= {16, 64}
    assert {made["kernel"] for made in found} >= {
        "mamba_scan",
        "mamba_spans",
        "mamba_scan_states.2",
    }
    for made in found:
        made["types"] = ["i32" if kind == "i32" else "*" for kind in made["types"]]
        check_ptx(made)


@pytest.mark.slow
def test_larger_blocks_and_float32_spill_nothing() -> None:
    for arguments in (("--block", "64"), ("--dtype", "fp32")):
        for line in command("--target", "9.0", "--json", *arguments):
            assert line["spill_bytes"] == 0, line
            assert line["shared_memory"] <= SHARED_MEMORY_LIMIT, line


@pytest.mark.slow
@pytest.mark.parametrize("target", ["8.0", "8.6", "8.9"])
def test_the_scan_spills_nothing_in_float32(target: str) -> None:
    """With Triton 3.9 it spilled on 8.6 and 8.9, with 3.6 on 8.0."""
    lines = command("--target", target, "--json", "--dtype", "fp32")
    scan = [line for line in lines if line["kernel"].startswith("mamba")]
    assert len(scan) == 5
    assert not [line for line in scan if line["spill_bytes"]]


@pytest.mark.slow
def test_full_size_kernels_for_an_h200(tmp_path: Path) -> None:
    """Through the command line: registers, spills and shared memory at the released sizes."""
    lines = command("--target", "9.0", "--json", "--output", str(tmp_path))
    assert [line["kernel"] for line in lines] == [spec.name for spec in all_specs(Sizes())]
    for line in lines:
        assert line["spill_bytes"] == 0, line
        assert line["shared_memory"] <= SHARED_MEMORY_LIMIT, line
        assert line["ptx_version"] == "8.0"
    by_name = {line["kernel"]: line for line in lines}
    # Programs that a multiprocessor of 65536 registers holds at once, as the launch tables say:
    assert by_name["refine_vocabulary"]["registers"] <= 64  # eight of 128 threads
    assert by_name["mamba_scan"]["registers"] <= 128  # two of 256 threads

    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(f"{line['kernel']}.sm_90.ptx" for line in lines)
    wide_copy = r"cp\.async\.cg\.shared\.global \[.*\], 0x10"  # 16 bytes at a time
    up = (tmp_path / "experts_up.1.sm_90.ptx").read_text()
    assert "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16" in up
    assert re.search(wide_copy, up), "weights"
    vocabulary = (tmp_path / "refine_vocabulary.sm_90.ptx").read_text()
    assert re.search(wide_copy, vocabulary), "logits"


def command(*arguments: str) -> Any:
    """What `twotower kernels` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    start = [sys.executable, "-c", "from twotower_client.cli import main; main()", "kernels"]
    done = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def test_the_table_names_every_column() -> None:
    table = command("--target", "9.0").splitlines()
    assert table[0].split() == [
        "kernel",
        "target",
        "registers",
        "spilled",
        "B",
        "shared",
        "B",
        "threads",
        "PTX",
        "driver",
    ]
    assert table[1].split()[:2] == ["refine_vocabulary", "9.0"]
    assert len(table) == 1 + len(all_specs(Sizes()))


def test_an_unknown_gpu_is_an_error_of_the_user() -> None:
    start = [sys.executable, "-c", "from twotower_client.cli import main; main()"]
    done = subprocess.run([*start, "kernels", "--target", "7.5"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "no kernels for compute capability '7.5'" in done.stderr
    assert "9.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_sizes_that_no_kernel_has_are_refused() -> None:
    start = [sys.executable, "-c", "from twotower_client.cli import main; main()"]
    done = subprocess.run([*start, "kernels", "--block", "100000"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--block': 100000 is not in the range" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = (
        "from twotower_engines.kernels.compile import all_specs, compile_kernel\n"
        "from twotower_engines.kernels.spec import Sizes\n"
        "from twotower_engines.kernels.targets import target\n"
        "compile_kernel(all_specs(Sizes())[0], target('9.0'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "file" / "cache")
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "BuildError" in done.stderr
    assert "set TRITON_CACHE_DIR to a folder that can be written" in done.stderr


def test_nothing_compiles_while_the_interpreter_is_on() -> None:
    with pytest.raises(BuildError, match="TRITON_INTERPRET"):
        compile_kernel(all_specs(Sizes())[0], target("9.0"))


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "options",
    [("--dtype", "fp32"), *(("--experts", form) for form in ("plain", "fp8", "int4", "nvfp4"))],
)
def test_every_full_size_kernel_assembles_for_every_gpu(options: tuple[str, str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        tables = pool.map(
            lambda gpu: command("--target", gpu.compute_capability, *options, "--json"), TARGETS
        )
    for line in (line for table in tables for line in table):
        assert line["spill_bytes"] == 0, line
        assert line["shared_memory"] <= SHARED_MEMORY_LIMIT, line
