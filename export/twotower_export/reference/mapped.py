"""A checkpoint's tensors by name, mapped, and PyTorch modules filled with them.

Mapped means that a tensor's bytes are read when arithmetic touches them, and not before: of a layer
of experts, those that no token is routed to stay on the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from twotower_contract.config import ModelConfig
from twotower_contract.errors import CheckpointError
from twotower_contract.index import SINGLE_FILE, read_index
from twotower_contract.layout import Tower, base_name
from twotower_contract.shards import read_header
from twotower_export.reference.towers import ContextTower, Denoiser, on_meta

OpenShards = dict[str, Any]
"""Opened safetensors files by name; closed when they are let go."""


class NamedTensors:
    """A checkpoint's tensors by name, mapped; the base checkpoint's under the context tower's."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        index = read_index(checkpoint)
        if index is None:
            index = dict.fromkeys(read_header(checkpoint / SINGLE_FILE)[0], SINGLE_FILE)
        self._files = index

    def read(self, name: str) -> Tensor:
        """Return a tensor as it is stored.

        Raises:
            CheckpointError: The checkpoint has no tensor of this name.
        """
        return self.read_all([name])[name]

    def read_all(self, names: Iterable[str], opened: OpenShards | None = None) -> dict[str, Tensor]:
        """Tensors as they are stored. Their files stay mapped while the tensors live.

        Args:
            names: The tensors' names.
            opened: Files that were opened before, by name; takes those that are opened now.
                safetensors touches the first byte of each tensor, around which the system may read
                megabytes ahead: what is not needed should not be asked for.

        Raises:
            CheckpointError: The checkpoint has no tensor of one of these names.
        """
        from safetensors import safe_open

        shards: OpenShards = {} if opened is None else opened
        found: dict[str, Tensor] = {}
        for name in names:
            stored = name if name in self._files else base_name(name)
            if stored not in self._files:
                raise CheckpointError(
                    f"{self._checkpoint}: has no tensor {name}; restore its index"
                )
            file = self._files[stored]
            if file not in shards:
                shards[file] = safe_open(self._checkpoint / file, framework="pt")
            found[name] = cast(Tensor, shards[file].get_tensor(stored))
        return found


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
