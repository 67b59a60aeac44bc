"""Safetensors shards: headers, byte ranges and sampled digests, without reading the tensors.

The format is a little-endian uint64 `n`, `n` bytes of JSON that map each tensor to its dtype, shape
and byte range, then the bytes. Everything here works on the header and on a bounded number of
small reads, whatever the size of the file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twotower_contract.machine import read_at
from twotower_export.errors import CheckpointError, ConfigError
from twotower_export.json_file import parse_object

ITEM_SIZES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes per element by safetensors' dtype; only BF16 and F32 are accepted in a checkpoint."""

MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own bound

SHARD_SAMPLES: Final = 16
SHARD_SAMPLE_BYTES: Final = 4096
TENSOR_SAMPLE_BYTES: Final = 512
WHOLE_TENSOR_BYTES: Final = 4096
PIECE_BYTES: Final = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies.

    Attributes:
        dtype: as safetensors spells it, for example `BF16`.
        shape: its sizes.
        shard: index into the checkpoint's shards.
        begin, end: byte range, relative to the shard's `data_start`.
        sample: digest of a part of its content, 16 hex digits; see `tensor_sample`.
    """

    dtype: str
    shape: tuple[int, ...]
    shard: int
    begin: int
    end: int
    sample: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        file: name relative to the checkpoint.
        path: where it is.
        size: bytes of the whole file.
        data_start: offset of the first tensor byte, 8 + the header's length.
        sample_sha256: digest of its size and of spread samples; see `shard_sample`.
        sha256: of the whole content, in hex, where it is known without reading it; see
            `named_sha256`.
    """

    file: str
    path: Path
    size: int
    data_start: int
    sample_sha256: str
    sha256: str | None = None


def read_shard(path: Path, file: str, index: int) -> tuple[Shard, dict[str, Tensor]]:
    """Read one shard's header, check it against the file, and sample the content.

    Args:
        path: the file.
        file: its name relative to the checkpoint, for messages and the manifest.
        index: its place among the checkpoint's shards.

    Raises:
        CheckpointError: the file is missing, truncated, or not a consistent safetensors file.
    """
    size = _size(path)
    with _opened(path) as descriptor:
        header, data_start = _header(descriptor, path, size)
        entries = {
            name: _entry(path, name, value)
            for name, value in header.items()
            if name != "__metadata__"
        }
        _check_ranges(path, entries, size - data_start)
        tensors = {
            name: Tensor(
                dtype,
                shape,
                index,
                begin,
                end,
                tensor_sample(descriptor, data_start + begin, end - begin),
            )
            for name, (dtype, shape, begin, end) in entries.items()
        }
        sample = shard_sample(descriptor, size)
    return Shard(file, path, size, data_start, sample, named_sha256(path)), tensors


def named_sha256(path: Path) -> str | None:
    """The sha256 that a Hugging Face cache names a large file by, or None outside of one.

    A snapshot's files are links into `blobs`, where a file of Git LFS is called by its sha256 (and
    a small one by a digest of 40 digits). The hub's client does not hash what it downloads.
    """
    blob = path.resolve()
    is_named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None


def whole_sha256(path: Path, progress: Callable[[int], None]) -> str:
    """sha256 in hex of a whole file.

    Args:
        path: the file.
        progress: told the bytes that were read, after each piece.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(PIECE_BYTES))
    done = 0
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                done += count
                progress(done)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def shard_sample(descriptor: int, size: int) -> str:
    """sha256 over a file's size in decimal and 16 samples of 4 KiB, evenly spread, ends included.

    The runtime computes the same when it meets the shard again.
    """
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SHARD_SAMPLE_BYTES)
    for index in range(SHARD_SAMPLES):
        offset = last * index // (SHARD_SAMPLES - 1)
        digest.update(read_at(descriptor, SHARD_SAMPLE_BYTES, offset))
    return digest.hexdigest()


def tensor_sample(descriptor: int, offset: int, length: int) -> str:
    """First 16 hex digits of the sha256 of a tensor, or of 512 bytes in its middle.

    Up to 4 KiB are taken whole. One page per tensor: 12,544 tensors of 126 GB cost 50 MB of reads,
    and still each expert can be told from the others.
    """
    if length > WHOLE_TENSOR_BYTES:
        offset += (length // 2) & ~(TENSOR_SAMPLE_BYTES - 1)
        length = TENSOR_SAMPLE_BYTES
    return hashlib.sha256(read_at(descriptor, length, offset)).hexdigest()[:16]


def refuse_dangling(path: Path) -> None:
    """Refuse a link to nothing: what an interrupted download, or a cache cut short, leaves.

    Raises:
        CheckpointError: it is one.
    """
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path}: is a link to {path.readlink()}, which is not there: the download did "
            "not finish; fetch the checkpoint again, finished files are kept"
        )


def _size(path: Path) -> int:
    refuse_dangling(path)
    try:
        found = path.stat()
    except OSError:
        raise CheckpointError(
            f"{path}: this shard is missing; restore it or download the checkpoint again"
        ) from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "no ordinary file"
        raise CheckpointError(
            f"{path}: is {what}, not a shard; restore the file or download the checkpoint again"
        )
    return found.st_size


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if hasattr(os, "posix_fadvise"):  # no read-ahead around the samples
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def _header(descriptor: int, path: Path, size: int) -> tuple[dict[str, Any], int]:
    prefix = read_at(descriptor, 8, 0)
    if prefix.startswith(b"version "):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: is no safetensors file: it has {size} bytes and gives a header of {length}"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: is truncated: {size} bytes, but its header alone takes {8 + length}; "
            "restore it or download it again"
        )
    try:
        header = parse_object(read_at(descriptor, length, 8), f"{path}: its header")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return header, 8 + length


def _entry(path: Path, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of a header entry, consistent in themselves."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        bad = not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        bad = True
    if bad:
        raise CheckpointError(f"{path}: the header's entry for {name} is malformed: {value!r:.120}")
    item = ITEM_SIZES.get(dtype)
    if item is not None and end - begin != item * math.prod(shape):
        raise CheckpointError(
            f"{path}: {name} is {dtype} {list(shape)}, {item * math.prod(shape)} bytes, but its "
            f"header gives it {end - begin}"
        )
    return dtype, shape, begin, end


def _check_ranges(
    path: Path, entries: Mapping[str, tuple[str, tuple[int, ...], int, int]], available: int
) -> None:
    """The tensors must cover the data without gaps or overlaps, and the data must be there."""
    reached = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            what = "overlaps another tensor" if begin < reached else "follows a gap"
            raise CheckpointError(f"{path}: {name} {what}: it begins at {begin}, not {reached}")
        reached = end
    if reached > available:
        raise CheckpointError(
            f"{path}: is truncated: it has {available} bytes of tensors, and its header announces "
            f"{reached}; restore it or download it again"
        )
    if reached < available:
        raise CheckpointError(
            f"{path}: has {available - reached} bytes after its last tensor; "
            "it was damaged; download it again"
        )
