"""Safetensors files written piece by piece, so that memory stays bounded whatever their size."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final

from twotower_contract.errors import CheckpointError
from twotower_contract.machine import read_at
from twotower_contract.shards import ITEM_SIZES, TensorEntry
from twotower_export.checkpoint import Checkpoint

PIECE_BYTES: Final = 8 * 2**20


def write_header(target: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write the header of a file whose tensors follow in this order: dtype and shape by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    reached = 0
    for name, (dtype, shape) in tensors.items():
        size = ITEM_SIZES[dtype] * math.prod(shape)
        offsets = [reached, reached + size]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        reached += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors writes them
    target.write(struct.pack("<Q", len(text)) + text)


def tensor_pieces(checkpoint: Checkpoint, tensor: TensorEntry) -> Iterator[bytes]:
    """Yield a tensor's bytes, at most 8 MiB at a time.

    Raises:
        CheckpointError: Its file ends before the tensor does.
    """
    shard = checkpoint.shards[tensor.shard]
    offset, end = shard.data_start + tensor.begin, shard.data_start + tensor.end
    path = checkpoint.path / shard.file
    with path.open("rb", buffering=0) as source:
        while offset < end:
            piece = read_at(source.fileno(), min(PIECE_BYTES, end - offset), offset)
            if not piece:
                raise CheckpointError(f"{path}: ended while it was read; was it replaced?")
            yield piece
            offset += len(piece)
