"""Safetensors shards: headers, byte ranges and sampled digests, without reading the tensors.

The format is a little-endian uint64 `n`, `n` bytes of JSON that map each tensor to its dtype, shape
and byte range, then the bytes. Everything here works on the header and on a bounded number of
small reads, whatever the size of the file.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twotower_contract.errors import CheckpointError, printable
from twotower_contract.files import opened, refuse_pointer
from twotower_contract.json_file import parse_object
from twotower_contract.machine import read_at

ITEM_SIZES: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes per element by safetensors' dtype."""

NUMPY_DTYPES: Final = {"BF16": "<u2", "F32": "<f4", "F8_E4M3": "u1", "U8": "u1", "I32": "<i4"}
"""NumPy's dtype of what is stored, by safetensors' dtype; bfloat16 and FP8 as their bits."""

STORED_DTYPES: Final = ("BF16", "F32")
"""The dtypes of weights that are not quantized, in safetensors' spelling."""

MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own bound

SHARD_SAMPLES: Final = 16
SHARD_SAMPLE_BYTES: Final = 4096
TENSOR_SAMPLE_BYTES: Final = 512
WHOLE_TENSOR_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        shard: Index into the checkpoint's shards.
        dtype: As safetensors spells it, for example `BF16`.
        shape: Its sizes.
        begin, end: Byte range, relative to the shard's `data_start`.
        sample: Digest of a part of its content, 16 hex digits; see `_tensor_sample`.
    """

    shard: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sample: str

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes in the shard."""
        return self.end - self.begin

    @property
    def is_zero(self) -> bool:
        """Whether all bytes of the sample are 0, as in a file that was never filled."""
        return self.parameters > 0 and self.sample == _zero_sample(self.bytes)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        file: Name relative to the checkpoint.
        size: Bytes of the whole file.
        data_start: Offset of the first tensor byte, 8 + the header's length.
        sample_sha256: Digest of its size and of spread samples; see `sample_digest`.
        sha256: Digest of the whole content, in hex, where it is known; see `named_sha256`.
    """

    file: str
    size: int
    data_start: int
    sample_sha256: str
    sha256: str | None = None


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, and check it against the file.

    Returns:
        The header, `__metadata__` included, and the offset of the first tensor byte.

    Raises:
        CheckpointError: The file is missing, truncated, or not a consistent safetensors file.
    """
    with _opened(path) as descriptor:
        header, data_start, _ = _checked_header(descriptor, path)
    return header, data_start


def read_shard(path: Path, file: str, index: int) -> tuple[Shard, dict[str, TensorEntry]]:
    """Read one shard's header, check it against the file, and sample the content.

    Args:
        file: Its name relative to the checkpoint, as it stands in the manifest.
        index: Its place among the checkpoint's shards.

    Raises:
        CheckpointError: The file is missing, truncated, or not a consistent safetensors file.
    """
    with _opened(path) as descriptor:
        _, data_start, entries = _checked_header(descriptor, path)
        tensors = {
            name: TensorEntry(
                index,
                dtype,
                shape,
                begin,
                end,
                _tensor_sample(descriptor, data_start + begin, end - begin),
            )
            for name, (dtype, shape, begin, end) in entries.items()
        }
        size = os.fstat(descriptor).st_size
        sample = _shard_sample(descriptor)
    return Shard(file, size, data_start, sample, named_sha256(path)), tensors


def sample_digest(path: Path) -> str:
    """Return the sha256 in hex of a file's size and of 16 samples of 4 KiB, ends included.

    Raises:
        CheckpointError: The file is missing or cannot be read.
    """
    with _opened(path) as descriptor:
        return _shard_sample(descriptor)


def named_sha256(path: Path) -> str | None:
    """Return the sha256 by which a Hugging Face cache names a large file; None outside of one.

    A snapshot's files are links into `blobs`, where a file of Git LFS is called by its sha256 (and
    a small one by a digest of 40 digits). The hub's client does not hash what it downloads.
    """
    blob = path.resolve()
    is_named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    remedy = "restore it or download the checkpoint again"
    with opened(path, CheckpointError, "shard", remedy) as descriptor:
        if hasattr(os, "posix_fadvise"):  # no read-ahead around the samples
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor


def _shard_sample(descriptor: int) -> str:
    """Return the sha256 over the size in decimal and the samples, evenly spread."""
    size = os.fstat(descriptor).st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SHARD_SAMPLE_BYTES)
    for index in range(SHARD_SAMPLES):
        offset = last * index // (SHARD_SAMPLES - 1)
        digest.update(read_at(descriptor, SHARD_SAMPLE_BYTES, offset))
    return digest.hexdigest()


def _tensor_sample(descriptor: int, offset: int, length: int) -> str:
    """Return 16 hex digits of the sha256 of a tensor, or of 512 bytes in its middle.

    Up to 4 KiB are taken whole. One page per tensor: 12,544 tensors of 126 GB cost 50 MB of reads,
    and still each expert can be told from the others.
    """
    if length > WHOLE_TENSOR_BYTES:
        offset += (length // 2) & ~(TENSOR_SAMPLE_BYTES - 1)
        length = TENSOR_SAMPLE_BYTES
    return _digest(read_at(descriptor, length, offset))


@functools.cache
def _zero_sample(length: int) -> str:
    """Return the sample of a tensor of so many zero bytes."""
    return _digest(bytes(length if length <= WHOLE_TENSOR_BYTES else TENSOR_SAMPLE_BYTES))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


_Entries = dict[str, tuple[str, tuple[int, ...], int, int]]
"""Dtype, shape, begin and end of each tensor."""


def _checked_header(descriptor: int, path: Path) -> tuple[dict[str, Any], int, _Entries]:
    size = os.fstat(descriptor).st_size
    prefix = read_at(descriptor, 8, 0)
    refuse_pointer(path, read_at(descriptor, 32, 0), CheckpointError)
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
    content = read_at(descriptor, length, 8)
    header = parse_object(content, f"{path}: its header", CheckpointError)
    entries = {
        name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"
    }
    _check_ranges(path, entries, size - 8 - length)
    return header, 8 + length, entries


def _entry(path: Path, name: str, value: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, begin and end of a header entry, consistent in themselves."""
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        numbers = (*shape, begin, end)
        bad = not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in numbers)
    except (TypeError, KeyError, ValueError):
        bad = True
    if bad or not name.isprintable():
        raise CheckpointError(
            f"{path}: the header's entry for {printable(name)} is malformed: {value!r:.120}"
        )
    item = ITEM_SIZES.get(dtype)
    if item is not None and end - begin != item * math.prod(shape):
        raise CheckpointError(
            f"{path}: {name} is {dtype} {list(shape)}, {item * math.prod(shape)} bytes, but its "
            f"header gives it {end - begin}"
        )
    return dtype, shape, begin, end


def _check_ranges(path: Path, entries: _Entries, available: int) -> None:
    """Refuse tensors that leave gaps, overlap, or reach beyond the data."""
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
