"""Compiles kernels ahead of time, for GPUs that this machine does not need to have.

The result is PTX that a TensorRT plugin can carry: its parameters are exactly the kernel's own, and
its version is one that the GPU's oldest driver takes (`targets`). The Triton compiler keeps its own
cache of what it compiled; nothing is cached here.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError

from twotower_engines.errors import BuildError
from twotower_engines.kernels import experts, linear, mamba, refine, router
from twotower_engines.kernels.jit import INTERPRETED, SHARED_MEMORY_LIMIT
from twotower_engines.kernels.spec import KernelSpec, Sizes
from twotower_engines.kernels.targets import Target

ALIGNED = [["tt.divisibility", 16]]
"""Every tensor starts at a multiple of 16 bytes: TensorRT's, torch's and our own allocations do."""


@dataclass(frozen=True)
class Compiled:
    """A kernel as PTX.

    Attributes:
        entry: Name to launch.
        ptx: Source, for `target` alone.
        parameters: Declarations of the entry's parameters by name, in the kernel's order.
        threads: Threads of a program.
        shared_memory: Bytes of dynamic shared memory of a program.
    """

    name: str
    target: Target
    entry: str
    ptx: str
    parameters: dict[str, str]
    threads: int
    shared_memory: int

    @property
    def ptx_version(self) -> str:
        """Version of PTX that the file states, as `8.0`."""
        found = re.search(r"^\.version (\S+)", self.ptx, re.MULTILINE)
        assert found, "the compiler wrote no version"
        return found.group(1)

    def arranged(self, order: Sequence[str | None]) -> str:
        """Return the same kernel with its parameters in another order.

        PTX refers to parameters by name, so their order is free.

        Args:
            order: Every parameter's name once; None for a pointer that is passed and ignored.
        """
        assert sorted(filter(None, order)) == sorted(self.parameters), (
            "order names other parameters"
        )
        ignored = ".param .u64 .ptr .global .align 1 {}_ignored_{}"
        lines = [
            self.parameters[name] if name else ignored.format(self.entry, index)
            for index, name in enumerate(order)
        ]
        return _with_parameters(self.ptx, self.entry, lines)


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel, as the assembler reports them.

    Attributes:
        registers: 32-bit registers of a thread.
        spill_bytes: Bytes that a thread stores and loads because registers ran out.
    """

    registers: int
    spill_bytes: int


def all_specs(sizes: Sizes) -> list[KernelSpec]:
    """Return every kernel of one model."""
    specs = (refine.specs, router.specs, experts.specs, linear.specs, mamba.specs)
    return [spec for some in specs for spec in some(sizes)]


def compile_kernel(spec: KernelSpec, target: Target) -> Compiled:
    """Return the PTX of one kernel for one GPU.

    A GPU may need a few bytes of shared memory beside the tiles: where these leave no room for
    them, there is one tile less in flight.

    Raises:
        BuildError: Kernels were loaded for the interpreter.
    """
    if INTERPRETED:
        raise BuildError(
            "kernels cannot be compiled while TRITON_INTERPRET is set; unset it and start again"
        )
    pointers = {
        (index,): ALIGNED
        for index, name in enumerate(spec.function.arg_names)
        if spec.types.get(name, "").startswith("*")
    }
    signature = {name: spec.types.get(name, "constexpr") for name in spec.function.arg_names}
    source = ASTSource(spec.function, signature, spec.all_constants, pointers)
    options = {**spec.launch.options, "ptx_version": target.ptx}
    with triton.knobs.compilation.scope():
        # Line information holds the paths of this machine: the same kernel would differ by folder.
        triton.knobs.compilation.disable_line_info = True
        built = _compiled(source, target, options)
        if built.metadata.shared > SHARED_MEMORY_LIMIT and spec.launch.num_stages > 2:
            options["num_stages"] -= 1
            built = _compiled(source, target, options)
    metadata, ptx = built.metadata, built.asm["ptx"]
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise BuildError(
            f"kernel {spec.name} needs scratch memory, which a plugin cannot give: "
            "do not use tensor descriptors made on the device"
        )
    ptx = _for_a_family(ptx)
    declared = _declared(ptx, metadata.name, len(spec.types))
    return Compiled(
        name=spec.name,
        target=target,
        entry=metadata.name,
        ptx=_with_parameters(ptx, metadata.name, declared),
        parameters=dict(zip(spec.types, declared, strict=True)),
        threads=32 * metadata.num_warps,
        shared_memory=metadata.shared,
    )


def _compiled(source: ASTSource, target: Target, options: dict[str, Any]) -> Any:
    """Return what the Triton compiler makes, or what is in its cache."""
    cache = Path(triton.knobs.cache.dir)
    remedy = "set TRITON_CACHE_DIR to a folder that can be written"
    if cache.parts[:1] == ("~",):  # it would be made under that very name in the current folder
        raise BuildError(f"Triton has no place for its cache: this user has no home; {remedy}")
    try:
        return triton.compile(source, target=GPUTarget("cuda", target.arch, 32), options=options)
    except CompilationError as problem:
        raise BuildError(
            f"a kernel cannot be compiled for compute capability {target.compute_capability} in "
            f"these sizes; ask for a smaller block: {problem}"
        ) from problem
    except OSError as problem:
        raise BuildError(
            f"{problem.filename2 or problem.filename or cache}: Triton's cache cannot be written "
            f"({problem.strerror or problem}); {remedy}"
        ) from problem


ONE_CHIP = re.compile(r"wgmma|setmaxnreg|tcgen05|redux\.sync\S*\.f32|\.b8x16|\.kind::")
"""Instructions of one chip alone: its PTX states `sm_90a`, and no other GPU takes it."""


def _for_a_family(ptx: str) -> str:
    """Return PTX that later GPUs take too, unless it uses what only one chip has."""
    if ONE_CHIP.search(ptx):
        return ptx
    return re.sub(r"^(\.target sm_\d+)a$", r"\1", ptx, count=1, flags=re.MULTILINE)


ENTRY = r"(?<=\.visible \.entry {}\()(.*?)(?=\n\))"
"""The parameter list of an entry."""


def _declared(ptx: str, entry: str, count: int) -> list[str]:
    """Return the declarations of an entry's own `count` parameters.

    The compiler adds two pointers to scratch memory at the end. TensorRT passes a kernel's own
    arguments only, so the driver would read two pointers past the end of its list: they must go.

    Raises:
        BuildError: The parameters are not as expected, or a scratch pointer is used.
    """
    found = re.search(ENTRY.format(re.escape(entry)), ptx, re.DOTALL)
    lines = [line.strip().rstrip(",") for line in found.group(1).split("\n")[1:]] if found else []
    if len(lines) != count + 2:
        raise BuildError(
            f"PTX of {entry} has {len(lines)} parameters, {count + 2} were expected: "
            "is this the pinned version of Triton?"
        )
    for line in lines[count:]:
        name = line.split()[-1]
        if len(re.findall(rf"\b{re.escape(name)}\b", ptx)) != 1:
            raise BuildError(f"PTX of {entry} uses its scratch pointer {name}")
    return lines[:count]


def _with_parameters(ptx: str, entry: str, lines: Sequence[str]) -> str:
    """Return PTX whose entry has these parameters."""
    text = "".join(f"\n\t{line}," for line in lines).rstrip(",")
    return re.sub(ENTRY.format(re.escape(entry)), lambda _: text, ptx, count=1, flags=re.DOTALL)


def resources(compiled: Compiled) -> Resources | None:
    """Return registers and spills by the assembler of the Triton package; None without it."""
    tool = (
        triton.knobs.nvidia.ptxas
        if compiled.target.arch < 90
        else triton.knobs.nvidia.ptxas_blackwell
    )
    try:
        program = Path(tool.path)
    except RuntimeError:  # a build of Triton without NVIDIA's tools
        return None
    architecture = re.search(r"^\.target (\w+)", compiled.ptx, re.MULTILINE)
    assert architecture, "the compiler wrote no target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(compiled.ptx)
        command: list[str | Path] = [
            program,
            "-v",
            f"--gpu-name={architecture.group(1)}",
            source,
            "-o",
            source.with_suffix(".o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(
            f"ptxas refused {compiled.name} for {compiled.target.compute_capability}: {done.stderr}"
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers, f"ptxas reported no registers: {done.stderr}"
    return Resources(int(registers.group(1)), sum(int(size) for size in spills))
