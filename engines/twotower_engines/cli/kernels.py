"""The verb `twotower kernels`: compiles the kernels for any GPU, and lists their resources."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from twotower_contract.atomic import write_text
from twotower_contract.engine_set import MAX_BLOCK
from twotower_contract.progress import StatusLine
from twotower_contract.tables import aligned

if TYPE_CHECKING:
    from twotower_engines.kernels.compile import Compiled
    from twotower_engines.kernels.spec import KernelSpec

LOG_SECONDS = 10.0  # between two lines where standard error is no terminal

COLUMNS = {
    "kernel": "kernel",
    "target": "target",
    "registers": "registers",
    "spill_bytes": "spilled B",
    "shared_memory": "shared B",
    "threads": "threads",
    "ptx_version": "PTX",
    "driver_cuda": "driver",
}


@click.command(
    epilog="""\b
Examples:
  twotower kernels
  twotower kernels --target 9.0 --experts nvfp4
  twotower kernels --json > kernels.json
  twotower kernels --target 8.9 --output ptx/
"""
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="X.Y",
    help="Compute capability to compile for; may be given again.  [default: all]",
)
@click.option(
    "--experts",
    default="plain",
    type=click.Choice(["plain", "fp8", "int4", "nvfp4"]),
    help="Format of the experts' weights; plain is that of --dtype.",
)
@click.option("--block", type=click.IntRange(1, MAX_BLOCK), default=16, help="Tokens of a block.")
@click.option(
    "--dtype",
    default="bf16",
    type=click.Choice(["bf16", "fp32"]),
    help="Type of weights and activations.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one object per kernel and target.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write the PTX of each kernel into this folder too.",
)
def kernels(
    targets: tuple[str, ...],
    experts: str,
    block: int,
    dtype: str,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compile our GPU kernels and list their resources.

    Every kernel of the released model's sizes is compiled to PTX for each GPU generation, without a
    GPU. Registers and spills are per thread and are the assembler's; shared memory is per program.
    `driver` is the CUDA version whose driver first takes that PTX. A kernel that TensorRT
    chooses a tactic of is listed in every one: the number ends its name.
    """
    from twotower_engines.kernels.compile import all_specs
    from twotower_engines.kernels.spec import Sizes
    from twotower_engines.kernels.targets import TARGETS, target

    if experts != "plain" and dtype != "bf16":
        raise click.UsageError(f"experts of {experts} have bf16 activations: leave --dtype out")
    wanted = [target(name) for name in targets] or list(TARGETS)
    specs = all_specs(Sizes(experts_format=experts, block=block, dtype=dtype))
    lines = []
    count = len(wanted) * len(specs)
    report = StatusLine(LOG_SECONDS, quiet_seconds=0.0)  # the first time takes minutes
    for number, (gpu, spec) in enumerate(((gpu, spec) for gpu in wanted for spec in specs), 1):
        if report.is_due():
            what = f"{spec.name} for {gpu.compute_capability}"
            report.draw(f"compiling {number} of {count}: {what}")
        lines.append(_line(spec, gpu, output))
    report.clear()
    if as_json:
        click.echo(json.dumps(lines, indent=2))
        return
    cells = [["-" if line[key] is None else str(line[key]) for key in COLUMNS] for line in lines]
    click.echo("\n".join(aligned([list(COLUMNS.values()), *cells])))


def _line(spec: KernelSpec, gpu: Any, output: Path | None) -> dict[str, Any]:
    """Return the resources of one kernel on one GPU."""
    from twotower_engines.kernels.compile import compile_kernel, resources

    compiled = compile_kernel(spec, gpu)
    used = resources(compiled)
    if output is not None:
        _write(compiled, output)
    return {
        "kernel": spec.name,
        "target": gpu.compute_capability,
        "registers": used.registers if used else None,
        "spill_bytes": used.spill_bytes if used else None,
        "shared_memory": compiled.shared_memory,
        "threads": compiled.threads,
        "ptx_version": compiled.ptx_version,
        "driver_cuda": gpu.cuda,
        "tiles": dict(spec.launch.constants),
        "stages": spec.launch.num_stages,
    }


def _write(compiled: Compiled, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{compiled.name}.sm_{compiled.target.arch}.ptx"
    write_text(path, compiled.ptx)
