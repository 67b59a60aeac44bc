"""An engine set: one folder with everything that one SKU needs to run, but the weights.

```
ENGINES/<sku>/build.json                   what was built, from what, for what (this module)
              manifest.json tokenizer.json copied from the bundle
              context.onnx denoiser.onnx   or context.plan denoiser.plan
              context.traffic.json ...     the kernels of a plan, where its builder says them
```
Builders write the record with `write_build_record`; everything that runs engines starts with
`open_engine_set`. Nothing here loads an engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twotower_contract.digests import file_state
from twotower_contract.errors import EngineSetError
from twotower_contract.json_file import Document, read_json, write_json
from twotower_contract.manifest import MANIFEST_FILE, Manifest, read_manifest

FORMAT = "twotower-engines"
FORMAT_VERSION = 1
MAX_SLOTS = 256
MAX_BLOCK = 256
"""Largest block of an engine, in tokens."""
BUILD_FILE = "build.json"


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that an engine set was built for.

    Attributes:
        slots: Requests that can be in flight at once.
        context: Tokens of a request, prompt and answer together.
        max_tokens_per_call: Tokens of one row in one call of the context engine.
        block_size_max: Largest block that the denoiser takes.
    """

    slots: int
    context: int
    max_tokens_per_call: int
    block_size_max: int

    @property
    def cache_tokens(self) -> int:
        """Tokens that a slot's keys and values have room for: a request's, and a call's behind."""
        return self.context + max(self.max_tokens_per_call, self.block_size_max)


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine: file name inside the engine set, and sha256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class BuildRecord:
    """The content of build.json.

    Attributes:
        sku: Name of the GPU, or `cpu`.
        flavour: `onnxruntime`, `tensorrt` or `tensorrt-rtx`.
        precision: Precision of the weights in the engines, for example `float32` or `bf16`.
        limits: Limits that the engines accept.
        plans: Tower (`context`, `denoiser`) to engine file. No `denoiser` where only the context
            tower was exported.
        traffic: Tower to the file that lists its engine's kernels (`traffic.py`); none where the
            builder does not say them.
        compute_capability: As `9.0`; None for the CPU.
        machine: CPU architecture that the engines run on, as `platform.machine()` says it; None for
            any.
        cuda: CUDA version that the driver must know, as `12.0`; None where unknown.
        versions: Name of each tool that took part to its version.
        graph_sha256: Tower to the digest of the graph that its engine was built from.
        profiles: Tower to the optimization profiles, as the flavour describes them.
        memory: The memory plan, in bytes.
        key: The build cache's key.
        bundle_fingerprint: Fingerprint of the checkpoint that the bundle was exported from.
        extra: Anything else that the flavour's loader needs.
    """

    sku: str
    flavour: str
    precision: str
    limits: Limits
    plans: dict[str, EngineFile]
    traffic: dict[str, EngineFile] = field(default_factory=dict)
    compute_capability: str | None = None
    machine: str | None = None
    cuda: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    graph_sha256: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    bundle_fingerprint: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the content of build.json."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}


@dataclass(frozen=True, slots=True)
class EngineSet:
    """An opened engine set: its folder, its build record and the manifest of its bundle."""

    folder: Path
    build: BuildRecord
    manifest: Manifest

    def engine_path(self, tower: str) -> Path:
        """Return the engine file of `context` or `denoiser`.

        Raises:
            EngineSetError: That tower was not built.
        """
        if tower not in self.build.plans:
            had = ", ".join(sorted(self.build.plans)) or "none"
            raise EngineSetError(
                f"{self.folder}: holds no engine of the {tower} tower (only {had}); "
                "export the checkpoint with both towers and build again"
            )
        return self.folder / self.build.plans[tower].file

    def check_engine_files(self) -> None:
        """Compare every engine file with the digest in the build record.

        Raises:
            EngineSetError: A file is missing or was changed since it was built.
        """
        for tower in self.build.plans:
            path = self.engine_path(tower)
            state = file_state(path, self.build.plans[tower].sha256)
            if state == "missing":
                raise EngineSetError(f"{path}: is missing; build the engines again")
            if state == "changed":
                raise EngineSetError(
                    f"{path}: its sha256 is not the one in {BUILD_FILE}: changed since it was "
                    "built; build the engines again"
                )


def write_build_record(folder: Path, record: BuildRecord) -> None:
    """Write build.json. Write it last: a folder without it is no engine set."""
    write_json(folder / BUILD_FILE, record.as_json())


def find_engine_sets(path: Path) -> list[Path]:
    """Return `path` if it is an engine set, else the engine sets in it, sorted; [] for neither."""
    if (path / BUILD_FILE).is_file():
        return [path]
    return sorted(one.parent for one in path.glob(f"*/{BUILD_FILE}")) if path.is_dir() else []


def open_engine_set(path: Path, sku: str | None = None) -> EngineSet:
    """Open `ENGINES/<sku>`, or `ENGINES` where the SKU is named or the only one.

    Raises:
        EngineSetError: There is no engine set, several and none was named, or its record is bad.
        BundleError: Its copy of the manifest is bad.
    """
    folder = _resolve(path, sku)
    build = _record(read_json(folder / BUILD_FILE, EngineSetError, "build the engines again"))
    if sku is not None and build.sku != sku:
        raise EngineSetError(f"{folder}: was built for `{build.sku}`, not for `{sku}`")
    if not (folder / MANIFEST_FILE).is_file():
        raise EngineSetError(f"{folder}: {MANIFEST_FILE} is missing; build the engines again")
    manifest = read_manifest(folder)
    _check_limits(folder / BUILD_FILE, build.limits, manifest)
    return EngineSet(folder, build, manifest)


def _resolve(path: Path, sku: str | None) -> Path:
    """Return the folder that holds build.json."""
    found = find_engine_sets(path)
    if found == [path]:
        return path
    if not path.is_dir():
        raise EngineSetError(f"{path}: no such folder; build engines with `twotower build`")
    names = ", ".join(one.name for one in found)
    if sku is not None:
        if path / sku in found:
            return path / sku
        raise EngineSetError(
            f"{path}: holds no engines for `{sku}` (found: {names or 'none'}); "
            f"build them with `twotower build BUNDLE --sku {sku} {path}`"
        )
    if not found:
        raise EngineSetError(
            f"{path}: is no engine set, neither it nor a folder in it holds {BUILD_FILE}; "
            "build engines with `twotower build BUNDLE --sku cpu ENGINES`"
        )
    if len(found) > 1:
        raise EngineSetError(f"{path}: holds engines for {names}; name one with --sku")
    return found[0]


def _record(document: Document) -> BuildRecord:
    document.check_format(FORMAT, FORMAT_VERSION)
    profiles = document.section("profiles")

    def files(key: str) -> dict[str, EngineFile]:
        return {name: one.record(EngineFile) for name, one in document.sections(key).items()}

    return document.record(
        BuildRecord,
        limits=document.section("limits").record(Limits),
        plans=files("plans"),
        traffic=files("traffic") if "traffic" in document.values else {},
        profiles={
            tower: [one.values for one in profiles.items(tower)] for tower in profiles.values
        },
    )


def _check_limits(path: Path, limits: Limits, manifest: Manifest) -> None:
    """Refuse limits that no build has: a runtime makes room for all that they promise."""
    most = {
        "slots": MAX_SLOTS,
        "context": manifest.model.max_position_embeddings,
        "max_tokens_per_call": manifest.max_tokens_per_call,
        "block_size_max": MAX_BLOCK,
    }
    for name, value in asdict(limits).items():
        if not 1 <= value <= most[name]:
            raise EngineSetError(
                f"{path}: the field `limits: {name}` is {value}, not 1 to {most[name]}; build the "
                "engines again"
            )
