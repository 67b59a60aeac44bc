"""One safetensors file: its header, and digests of its content that the exporter computes as well.

The format is a little-endian uint64 `n`, `n` bytes of JSON that map each tensor to its dtype, shape
and byte range, then the bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from io import FileIO
from pathlib import Path
from typing import Any

from twotower_engines.errors import CheckpointError

__all__ = ["named_sha256", "read_header", "sample_digest", "tensor_sample"]

SAMPLES = 16
SAMPLE_BYTES = 4096
TENSOR_SAMPLE_BYTES = 512
MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file.

    Returns:
        The header's entries, and the offset of the first tensor byte.

    Raises:
        CheckpointError: The file is too short, or its header is no JSON object.
    """
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        content = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    try:
        header = json.loads(content) if len(content) == length else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is no safetensors file, or was truncated; restore it")
    return header, 8 + length


def sample_digest(path: Path) -> str:
    """Return a sha256 in hex of a shard's size and 16 samples of 4 KiB, evenly spread.

    The exporter writes the same into the manifest.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as stream:
        for index in range(SAMPLES):
            stream.seek(max(0, size - SAMPLE_BYTES) * index // (SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def tensor_sample(stream: FileIO, offset: int, length: int) -> str:
    """Return 16 hex digits of the sha256 of a tensor, or of 512 bytes in its middle.

    The exporter writes the same into the manifest.

    Args:
        stream: The shard.
        offset: Of the tensor's first byte in the file.
        length: Of the tensor in bytes; up to 4 KiB are taken whole.
    """
    if length > SAMPLE_BYTES:
        offset += length // 2 // TENSOR_SAMPLE_BYTES * TENSOR_SAMPLE_BYTES
        length = TENSOR_SAMPLE_BYTES
    stream.seek(offset)
    return hashlib.sha256(stream.read(length)).hexdigest()[:16]


def named_sha256(path: Path) -> str | None:
    """Return the sha256 that a Hugging Face cache names a large file by; None outside of one.

    There a shard is a link into the folder `blobs`, to a file that is called by its sha256.
    """
    blob = path.resolve()
    is_named = blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name)
    return blob.name if is_named else None
