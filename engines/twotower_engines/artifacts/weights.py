"""The checkpoint's bytes, mapped and checked, and the weight inputs made of them.

Before anything is loaded, the shards are compared with the manifest: their sizes, every entry of
their headers, and a digest of samples of their content. After that a weight input is one array:
expert matrices stacked, bf16 widened to float32 where a graph computes in it. Needs neither torch
nor safetensors: the format is a length, a JSON header, and raw little-endian bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.errors import CheckpointError, listed
from twotower_contract.manifest import Manifest, WeightInput
from twotower_contract.moved_tensors import moved_tensors
from twotower_contract.quantized import decode, scale_names
from twotower_contract.shards import NUMPY_DTYPES, Shard, TensorEntry, read_shard

COPIED_BYTES = 16 * 2**20
"""Largest float32 weight that is copied: of the released layout all but embeddings and heads."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class WeightStore:
    """The tensors of one checkpoint, read through memory maps.

    Only the pages that are asked for are read, and the system may drop them again: the resident
    memory of this class is bounded by the largest weight that is being made.

    Args:
        manifest: Record of the tensors.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
    """

    def __init__(self, manifest: Manifest, checkpoint: Path | None = None) -> None:
        self.manifest = manifest
        self.folder = checkpoint if checkpoint is not None else manifest.checkpoint.path
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}
        self._checked: dict[int, tuple[int, ...]] = {}

    def check(self) -> None:
        """Compare every shard with the manifest.

        Raises:
            CheckpointError: The folder or a shard is missing, or a shard's size, header or sampled
                content is not what it was at export. Where tensors only changed places, the
                message says how.
        """
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{self.folder}: the checkpoint of these engines is not there; "
                "if it was moved, say where it is with --checkpoint PATH"
            )
        for index, shard in enumerate(self.manifest.shards):
            try:
                self._check_shard(index, shard)
            except CheckpointError as error:
                reason = self._moved()
                if reason is None:
                    raise
                raise CheckpointError(
                    f"{self.folder}: is not the checkpoint of these engines as it was exported: "
                    f"{reason}; restore its files, or export this checkpoint and build again"
                ) from error

    def raw(self, tensor: str) -> npt.NDArray[Any]:
        """Return a checkpoint tensor as it is stored, without a copy.

        Returns:
            The tensor's shape; float32, uint16 holding the bits of bf16, or the codes and E4M3
            scales of a quantized matrix as integers. Read-only.
        """
        entry = self.manifest.tensors[tensor]
        start = self.manifest.shards[entry.shard].data_start
        content = self._map(entry.shard)[start + entry.begin : start + entry.end]
        return content.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def float32(self, weight: WeightInput) -> npt.NDArray[np.float32]:
        """Return a weight input in float32: a view where the checkpoint stores a large one so.

        A small one is copied, so that no later change of its file reaches it; see `stays_mapped`.
        bf16 is the upper half of a float32, so widening is a shift by 16 bits and exact. Quantized
        matrices are decoded.

        Raises:
            CheckpointError: A scale is no number above 0.
        """
        sources = [self._decoded(source) for source in weight.sources]
        if stays_mapped(weight):
            view = sources[0].reshape(weight.shape)
            return view if view.flags.aligned else view.copy()
        made = np.empty(weight.shape, dtype=np.float32)
        parts = made if weight.how == "stack" else [made]
        for part, source in zip(parts, sources, strict=True):
            widen(source.reshape(part.shape), part)
        return made

    def _decoded(self, source: str) -> npt.NDArray[Any]:
        """Return a source as it is stored, or in float32 where it is quantized."""
        dtype = self.manifest.tensors[source].dtype
        scales = [self.raw(name) for name in scale_names(source, dtype)]
        if not scales:
            return self.raw(source)
        try:
            decoded: npt.NDArray[np.float32] = decode(np, dtype, self.raw(source), scales)
        except ValueError as problem:
            raise CheckpointError(
                f"{self.folder}: {source}: {problem}; quantize the checkpoint again"
            ) from problem
        return decoded

    def all_float32(
        self, tower: str, progress: Progress | None = None
    ) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yield (name, array) of every weight input of a tower's graph, in the manifest's order."""
        weights = self.manifest.weights[tower]
        total = 4 * sum(math.prod(weight.shape) for weight in weights.values())
        done = 0
        for name, weight in weights.items():
            array = self.float32(weight)
            yield name, array
            done += array.nbytes
            if progress is not None:
                progress(done, total)
        for index in self._maps:
            self._refuse_changed(index)

    def mapped_bytes(self, tower: str, names: Collection[str]) -> int:
        """Return the bytes of some float32 weights of a tower that are views of their files."""
        weights = self.manifest.weights[tower]
        views = (one for one in weights.values() if one.name in names and stays_mapped(one))
        return sum(4 * math.prod(one.shape) for one in views)

    def _map(self, index: int) -> npt.NDArray[np.uint8]:
        """Return the bytes of a shard; those of the file that was checked, where one was."""
        if index not in self._maps:
            path = self.folder / self.manifest.shards[index].file
            self._maps[index] = np.memmap(path, dtype=np.uint8, mode="r")
            self._refuse_changed(index)
        return self._maps[index]

    def _refuse_changed(self, index: int) -> None:
        path = self.folder / self.manifest.shards[index].file
        if self._checked.get(index, _state(path)) != _state(path):
            raise CheckpointError(
                f"{path}: was changed while it was read; restore it, and load the engines again"
            )

    def _check_shard(self, index: int, shard: Shard) -> None:
        path = self.folder / shard.file
        if path.is_file():
            self._checked[index] = _state(path)
            if path.stat().st_size != shard.size:
                raise CheckpointError(
                    f"{path}: has {path.stat().st_size} bytes, but {shard.size} when it was "
                    "exported; restore the file, or export the checkpoint again"
                )
        found, tensors = read_shard(path, shard.file, index)
        recorded = {n: entry for n, entry in self.manifest.tensors.items() if entry.shard == index}
        problems = [] if found.data_start == shard.data_start else ["the header's length"]
        for name, entry in recorded.items():
            if name not in tensors or replace(tensors[name], sample=entry.sample) != entry:
                problems.append(name)
        if problems:
            raise CheckpointError(
                f"{path}: its header changed since export: {listed(problems)}; "
                "export the checkpoint again"
            )
        if found.sha256 and shard.sha256 and found.sha256 != shard.sha256:
            raise CheckpointError(
                f"{path}: is another file than at export: the cache names it {found.sha256}, then "
                f"{shard.sha256}; name the snapshot that was exported with --checkpoint PATH, or "
                "export this one"
            )
        changed = [name for name, entry in recorded.items() if tensors[name] != entry]
        if changed or found.sample_sha256 != shard.sample_sha256:
            raise CheckpointError(
                f"{path}: its content changed since export (same size and header, other bytes"
                f"{' in ' + listed(changed) if changed else ''}); "
                "restore the file, or export the checkpoint again"
            )

    def _moved(self) -> str | None:
        """Look for the manifest's tensors in all shards of the folder, whatever these are called.

        Returns:
            A sentence on what happened to the tensors; None where more than their places changed.
        """
        shards: list[Shard] = []
        tensors: dict[str, TensorEntry] = {}
        try:
            for index, path in enumerate(sorted(self.folder.glob("*.safetensors"))):
                shard, found = read_shard(path, path.name, index)
                if tensors.keys() & found:
                    return None
                shards.append(shard)
                tensors |= found
        except CheckpointError:
            return None  # a broken shard, which is reason enough
        return moved_tensors(self.manifest.tensors, self.manifest.shards, tensors, shards)


def stays_mapped(weight: WeightInput) -> bool:
    """Whether a weight's float32 values are used where they lie, in the checkpoint's file."""
    is_stored_so = weight.how not in ("stack", "widen") and weight.dtype == "F32"
    return is_stored_so and 4 * math.prod(weight.shape) > COPIED_BYTES


def _state(path: Path) -> tuple[int, ...]:
    """Return what another content of a file changes."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def widen(source: npt.NDArray[Any], target: npt.NDArray[np.float32]) -> None:
    """Copy float32, or widen bf16 bits, into `target` of the same shape."""
    if source.dtype == np.float32:
        target[...] = source
    else:
        bits = target.view(np.uint32)
        bits[...] = source  # two plain passes are three times faster than one shift that casts
        bits <<= 16
