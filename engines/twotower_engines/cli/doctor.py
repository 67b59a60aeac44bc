"""The verb `twotower doctor`: what works on this machine and what is missing.

Nothing is imported: packages are found by name and recorded version, the GPU through its driver's
own tool. Nothing is changed.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import click

from twotower_contract.errors import TwoTowerError
from twotower_contract.machine import cores, memory_bytes
from twotower_engines.planning.local_gpu import driver_reports

# Distributions that somebody may ask about, in the order of the path from checkpoint to answer.
DISTRIBUTIONS = (
    "twotower",
    "numpy",
    "tritonclient",
    "onnx",
    "onnx-ir",
    "tokenizers",
    "huggingface_hub",
    "torch",
    "safetensors",
    "onnxruntime",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "nvidia-pytriton",
    "triton",
)
GPU_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")


EPILOG = """\b
Examples:
  twotower doctor
  twotower doctor --json
"""


@dataclass(frozen=True, slots=True)
class Ability:
    """Something that the project does, and whether it works here.

    Attributes:
        name: Name for people.
        missing: Missing parts, each with the remedy; empty where nothing is missing.
    """

    name: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Examination:
    """The findings.

    Attributes:
        python: Version of this interpreter.
        system: Operating system and architecture.
        cores: CPU cores that this process may use.
        memory_bytes: Memory of the machine, or of the control group where that is less.
        gpus: `GPU_FIELDS` of each GPU, as the driver's tool gives them.
        packages: Installed distributions, with their versions.
        server: Path of a Triton server; None where there is none.
        abilities: Abilities, in the order of the path from checkpoint to answer.
    """

    python: str
    system: str
    cores: int
    memory_bytes: int
    gpus: tuple[dict[str, str], ...]
    packages: dict[str, str]
    server: str | None
    abilities: tuple[Ability, ...]


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Report what works on this machine and what is missing."""
    found = examine()
    print(json.dumps(asdict(found), indent=2) if as_json else _text(found))


def examine() -> Examination:
    """Look at this machine."""
    packages = {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None}
    gpus = tuple(driver_reports(*GPU_FIELDS))
    server, server_problems = _server(packages)
    return Examination(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=cores(),
        memory_bytes=memory_bytes(),
        gpus=gpus,
        packages=packages,
        server=server,
        abilities=tuple(_abilities(packages, gpus, server_problems)),
    )


def _abilities(
    packages: dict[str, str], gpus: Sequence[dict[str, str]], server_problems: Sequence[str]
) -> list[Ability]:
    def needs(extra: str, *names: str) -> tuple[str, ...]:
        absent = [name for name in names if name not in packages]
        if not absent:
            return ()
        return (f"{', '.join(absent)}: pip install 'twotower[{extra}]'",)

    gpu = () if gpus else ("an NVIDIA GPU and its driver (nvidia-smi finds none)",)
    cpu_engines = needs("build", "onnxruntime", "tokenizers")
    rtx = _missing_rtx()
    return [
        Ability("ask a server (generate)"),
        Ability("plan what fits on which GPU (plan)"),
        Ability(
            "make a small checkpoint (tiny)",
            needs("reference", "torch", "safetensors", "tokenizers"),
        ),
        Ability("export a checkpoint (export, inspect)", needs("export", "onnx", "onnx-ir")),
        Ability("export from the hub", needs("export", "huggingface_hub")),
        Ability(
            "compare with PyTorch (verify)",
            needs("reference", "torch") + needs("build", "onnxruntime", "polygraphy"),
        ),
        Ability("build and run engines for the CPU (build --sku cpu, run)", cpu_engines),
        Ability("build TensorRT-RTX engines, without a GPU too", rtx),
        Ability(
            "run TensorRT-RTX engines",
            rtx + needs("rtx", "cuda-python") + needs("build", "tokenizers") + gpu,
        ),
        Ability(
            "build and run TensorRT engines",
            needs("tensorrt", "tensorrt", "cuda-python") + gpu,
        ),
        Ability("compile our kernels (kernels)", needs("kernels", "triton")),
        Ability("serve (package, serve)", (*cpu_engines, *server_problems)),
    ]


def _missing_rtx() -> tuple[str, ...]:
    """Return what the TensorRT-RTX flavour says: it knows which packages bring it."""
    from twotower_engines.building.flavours.tensorrt_rtx import TensorRtRtxFlavour

    try:
        TensorRtRtxFlavour().versions()
    except TwoTowerError as problem:
        return (str(problem),)
    return ()


def _server(packages: dict[str, str]) -> tuple[str | None, list[str]]:
    """Return where the Triton server is, and what keeps it from serving."""
    from twotower_engines.serving.installation import find_server, problem_of
    from twotower_engines.serving.place import refusal

    try:
        found = find_server()
    except TwoTowerError as problem:
        return None, [str(problem)]
    problems = []
    unusable = problem_of(found, packages["numpy"]) if "numpy" in packages else None
    if unusable is not None:
        problems.append(unusable)
    problems += filter(None, [refusal()])
    return found.source, problems


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(found: Examination) -> str:
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_cap']}, {gpu['memory.total']}, "
        f"driver {gpu['driver_version']}"
        for gpu in found.gpus
    ]
    width = max(len(name) for name in found.packages)
    lines = [
        "machine",
        f"  Python   {found.python}, {found.system}",
        f"  cores    {found.cores}",
        f"  memory   {found.memory_bytes / 2**30:.1f} GiB",
        *(f"  GPU      {gpu}" for gpu in gpus or ["none"]),
        f"  Triton   {found.server or 'no server found'}",
        "packages",
        *(f"  {name:{width}}  {version}" for name, version in found.packages.items()),
        "what works here",
    ]
    for ability in found.abilities:
        lines.append(f"  {'no ' if ability.missing else 'yes'}  {ability.name}")
        lines += [f"         missing: {one}" for one in ability.missing]
    return "\n".join(lines)
