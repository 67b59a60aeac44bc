"""A checkpoint's tensors by name, mapped, and PyTorch modules filled with them.

Quantized matrices are decoded when they are asked for, by PyTorch's own types and operators.

Mapped means that a tensor's bytes are read when arithmetic touches them, and not before: of a layer
of experts, those that no token is routed to stay on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from twotower_contract.config import ModelConfig
from twotower_contract.errors import CheckpointError
from twotower_contract.index import SINGLE_FILE, read_index
from twotower_contract.layout import Tower, base_name
from twotower_contract.quantized import E2M1, INT4_OFFSET, PACKED, scale_names
from twotower_contract.shards import read_header
from twotower_export.reference.towers import ContextTower, Denoiser, on_meta

DTYPES: Final = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
}
"""Stored dtypes as safetensors spells them."""

OpenShards = dict[str, Any]
"""Opened safetensors files by name; closed when they are let go."""


class NamedTensors:
    """A checkpoint's tensors by name, mapped; the base checkpoint's under the context tower's.

    Args:
        checkpoint: Its folder.
        decoded: Dtype of the matrices that are stored quantized.
    """

    def __init__(self, checkpoint: Path, decoded: torch.dtype = torch.float32) -> None:
        self._checkpoint, self._decoded = checkpoint, decoded
        index = read_index(checkpoint)
        if index is None:
            index = dict.fromkeys(read_header(checkpoint / SINGLE_FILE)[0], SINGLE_FILE)
        self._files = index

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored, or decoded where it is quantized.

        Raises:
            CheckpointError: The checkpoint has no tensor of this name.
        """
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str], opened: OpenShards | None = None) -> dict[str, Tensor]:
        """Tensors as they are stored, or decoded where they are quantized.

        Files stay mapped while what is stored in them lives.

        Args:
            names: The tensors' names.
            opened: Files that were opened before, by name; takes those that are opened now.
                safetensors touches the first byte of each tensor, around which the system may read
                megabytes ahead: what is not needed should not be asked for.

        Raises:
            CheckpointError: The checkpoint has no tensor of one of these names.
        """
        shards: OpenShards = {} if opened is None else opened
        found: dict[str, Tensor] = {}
        for name in names:
            for stored in (name, name + PACKED, base_name(name), base_name(name) + PACKED):
                if stored in self._files:
                    break
            else:
                raise CheckpointError(
                    f"{self._checkpoint}: has no tensor {name}; restore its index"
                )
            tensor = self._stored(stored, shards)
            dtype = next(key for key, one in DTYPES.items() if one == tensor.dtype)
            scales = [self._stored(one, shards) for one in scale_names(stored, dtype)]
            found[name] = _weights(tensor, scales).to(self._decoded) if scales else tensor
        return found

    def _stored(self, name: str, shards: OpenShards) -> Tensor:
        from safetensors import safe_open

        file = self._files[name]
        if file not in shards:
            shards[file] = safe_open(self._checkpoint / file, framework="pt")
        return cast(Tensor, shards[file].get_tensor(name))


def _weights(codes: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Return the weights of a quantized matrix, [out, in], in float32."""
    first = scales[0].float()
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float() * first
    if codes.dtype == torch.uint8:  # two of E2M1 in a byte
        nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
        values = torch.tensor(E2M1)[nibbles & 7] * (1 - 2 * (nibbles >> 3))
        first = first * scales[1]
    else:
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        nibbles = ((codes[..., None] >> shifts) & 15).flatten(-2)
        values = (nibbles - INT4_OFFSET).float()
    return values * first.repeat_interleave(values.shape[-1] // first.shape[-1], dim=-1)


def load_module(
    module: nn.Module,
    names: Mapping[str, str],
    tensors: NamedTensors,
    opened: OpenShards | None = None,
) -> None:
    """Fill parameters of a module made on the meta device; others stay there.

    Args:
        names: Parameter -> checkpoint tensor.
    """
    found = tensors.read_all(names.values(), opened)
    state = {parameter: found[name] for parameter, name in names.items()}
    module.load_state_dict(state, strict=False, assign=True)
    module.requires_grad_(False).eval()


def load_tower(config: ModelConfig, tower: Tower, tensors: NamedTensors) -> nn.Module:
    """Return a whole tower in float32; a base checkpoint's names serve for a context tower."""
    make = ContextTower if tower == "context" else Denoiser
    module: nn.Module = on_meta(lambda: make(config))
    load_module(module, {name: name for name in module.state_dict()}, tensors)
    return module.float()
