"""Engine sets of small random checkpoints, and the reference that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import reference as _reference
from tests.support.exports import without_golden

VOCABULARY = 300


@dataclass
class RandomEngines:
    """A random checkpoint with its engines for the CPU."""

    checkpoint: Path
    folder: Path

    @cached_property
    def engines(self):
        from twotower_contract.engine_set import open_engine_set

        return open_engine_set(self.folder)

    @cached_property
    def runtime(self):
        from twotower_engines.runtime.opening import open_runtime

        return open_runtime(self.engines, threads=1)

    @cached_property
    def reference(self):
        return _reference.ReferenceModel.load(self.checkpoint)


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The module `tests.support.reference`."""
    return _reference


@pytest.fixture(scope="session")
def random_engines(tmp_path_factory):
    """A function that makes engines of a random checkpoint, once for the same arguments.

    Args of the function: those of `write_random_checkpoint`; `poison`, a token whose embedding is
    made NaN; and `equal_towers`, whether the denoiser has the context tower's weights.
    """
    made: dict[str, RandomEngines] = {}

    def make(
        pattern: str = "MEM*EM*E", hidden: int = 32, seed: int = 0, dtype: str = "float32",
        poison: int | None = None, equal_towers: bool = False, **sizes: Any,
    ) -> RandomEngines:  # fmt: skip
        key = repr((pattern, hidden, seed, dtype, poison, equal_towers, sorted(sizes.items())))
        if key not in made:
            from twotower_export.tiny.checkpoints import write_random_checkpoint

            folder = tmp_path_factory.mktemp("random")
            sizes.setdefault("vocab_size", VOCABULARY)
            write_random_checkpoint(folder / "checkpoint", pattern, hidden, seed, dtype, **sizes)
            if poison is not None:
                _poison(folder / "checkpoint", poison, hidden)
            if equal_towers:
                _equal_towers(folder / "checkpoint")
            made[key] = _engines_of(folder)
        return made[key]

    return make


def _engines_of(folder: Path) -> RandomEngines:
    """Export and build the checkpoint in a folder."""
    from twotower_engines.building.build import BuildOptions, build_engines
    from twotower_export.bundle import write_bundle
    from twotower_export.checkpoint import open_checkpoint

    with without_golden():
        write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    options = BuildOptions(slots=4, context=512)
    engines, _ = build_engines(folder / "bundle", folder / "engines", options)
    return RandomEngines(folder / "checkpoint", engines.folder)


def _poison(checkpoint: Path, token: int, hidden: int) -> None:
    """Make the float32 embedding of a token NaN in both towers."""
    from twotower_contract.shards import read_header

    for path in checkpoint.glob("*.safetensors"):
        header, start = read_header(path)
        content = bytearray(path.read_bytes())
        for name, entry in header.items():
            if name.endswith("embeddings.weight"):
                begin = start + entry["data_offsets"][0] + 4 * hidden * token
                content[begin : begin + 4 * hidden] = b"\xff" * (4 * hidden)
        path.write_bytes(content)


def _equal_towers(checkpoint: Path) -> None:
    """Give the denoiser the context tower's weights."""
    from safetensors.torch import load_file, save_file

    shards = {path: load_file(path) for path in checkpoint.glob("*.safetensors")}
    whole = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    copied = 0
    for path, tensors in shards.items():
        for name in tensors:
            if name.startswith(("denoiser_tower.", "lm_head.")):
                tensors[name] = whole["context_" + name.removeprefix("denoiser_")].clone()
                copied += 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert copied == sum(name.startswith("context_") for name in whole)
