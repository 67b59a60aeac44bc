"""The size of a model: parameters and bytes per part, and the bytes of a context.

Computed from the configuration and the stored dtypes, for a checkpoint and for a bundle alike.
Knows nothing about GPUs but which of the table could hold it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from twotower_contract.config import ModelConfig
from twotower_contract.layout import Tower
from twotower_contract.manifest import Manifest
from twotower_contract.quantized import scale_names, weights_in
from twotower_contract.shards import ITEM_SIZES
from twotower_contract.sizes import (
    EXPERT_PARTS,
    MIXER_PARTS,
    PARTS,
    conv_bytes,
    kv_bytes_per_token,
    part_of,
    ssm_bytes,
    uniform_experts,
)
from twotower_contract.skus import Sku, known_skus

BLOCK: Final = 16
WORKSPACE_SHARE: Final = 0.05
CONTEXTS: Final = (4096, 32768, 131072, 262144)
EXPERTS_SEEN: Final = (60, 90)
"""Distinct experts per layer that 16 tokens of real text were routed to, least and most, of 128
(measured by drowzeys on two DGX Spark)."""


@dataclass(frozen=True)
class Part:
    """A part of a tower, named as in `PARTS`; its bytes are those of the stored tensors."""

    tower: Tower
    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Inventory:
    """Sizes of a model.

    Attributes:
        config: The model.
        parts: Parts of each tower, in order; empty ones are left out.
        dtypes: Tensors by stored dtype.
    """

    config: ModelConfig
    parts: tuple[Part, ...]
    dtypes: Mapping[str, int]

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.bytes for part in self.parts)

    def bytes_of_tower(self, tower: Tower) -> int:
        """Bytes of one tower with its head; the denoiser's include the time conditioning."""
        return sum(part.bytes for part in self.parts if part.tower == tower)

    def layer_parameters(self) -> dict[str, int]:
        """Parameters of one layer of each kind that there is, without its norm, and of one expert.

        Keys are `mamba`, `attention`, `mixture of experts` and `expert`.
        """
        first = self.parts[0].tower
        size = {part.name: part.parameters for part in self.parts if part.tower == first}
        layers = {kind: len(found) for kind, found in self.config.layers_of_kind.items()}
        per: dict[str, int] = {}
        for kind, name in MIXER_PARTS.items():
            if layers[kind]:
                per[name] = size.get(name, 0) // layers[kind]
        if layers["E"]:
            mixture = sum(size.get(name, 0) for name in EXPERT_PARTS.values())
            per["mixture of experts"] = mixture // layers["E"]
            routed = size.get("routed experts", 0)
            per["expert"] = routed // (layers["E"] * self.config.num_experts)
        return per

    def active_parameters(
        self, tower: Tower, *, head: bool = True, embeddings: bool = False
    ) -> int:
        """Parameters that one token uses; of the embeddings all or none are counted."""
        c = self.config
        size = {part.name: part.parameters for part in self.parts if part.tower == tower}
        active = sum(size.values()) - size.get("time conditioning", 0)
        routed = size.get("routed experts", 0)
        if routed:
            active -= routed - routed * c.num_experts_per_tok // c.num_experts
        active -= 0 if embeddings else size.get("embeddings", 0)
        return active - (0 if head else size.get("head", 0))

    def flops_per_pass(self, tower: Tower, tokens: int) -> int:
        """Multiplications and additions with weights, head included; no attention, no scan."""
        return 2 * tokens * self.active_parameters(tower)

    def bytes_per_pass(self, tower: Tower, experts: float) -> int:
        """Weights that a pass reads, if every layer uses this many of its experts.

        Embeddings are looked up, not read.
        """
        size = {part.name: part.bytes for part in self.parts if part.tower == tower}
        routed = size.pop("routed experts", 0)
        rest = sum(size.values()) - size.get("embeddings", 0)
        return rest + (round(routed * experts / self.config.num_experts) if routed else 0)

    def bytes_per_step(self, tower: Tower, tokens: int) -> int:
        """Weights that a pass over some tokens reads, if routing were uniform and independent."""
        return self.bytes_per_pass(tower, self._uniform_experts(tokens))

    def _uniform_experts(self, tokens: int) -> float:
        experts = self.config.num_experts if self.config.layers_of_kind["E"] else 0
        return uniform_experts(tokens, experts, self.config.num_experts_per_tok)

    def bytes_by_experts(self, tower: Tower) -> dict[int, int]:
        """Weights that a pass over 16 tokens reads, by the distinct experts per layer.

        For what real text needs, for uniform routing (rounded), and for all; empty without experts.
        """
        every = self.config.num_experts if self.config.layers_of_kind["E"] else 0
        counts = {round(self._uniform_experts(BLOCK)), every} - {0}
        counts |= {count for count in EXPERTS_SEEN if count < every}
        return {count: self.bytes_per_pass(tower, count) for count in sorted(counts)}

    def _tower_as_json(self, tower: Tower) -> dict[str, Any]:
        parts = [part for part in self.parts if part.tower == tower]
        return {
            "bytes": self.bytes_of_tower(tower),
            "parameters": sum(part.parameters for part in parts),
            "active_parameters_per_token": self.active_parameters(tower),
            "active_parameters_without_head": self.active_parameters(tower, head=False),
            "active_parameters_with_embeddings": self.active_parameters(tower, embeddings=True),
            "bytes_read_per_token": self.bytes_per_step(tower, 1),
            "bytes_read_per_16_tokens": self.bytes_per_step(tower, BLOCK),
            "bytes_read_per_16_tokens_by_experts": self.bytes_by_experts(tower),
            "flops_per_16_tokens": self.flops_per_pass(tower, BLOCK),
            "parts": {
                part.name: {
                    "tensors": part.tensors,
                    "parameters": part.parameters,
                    "bytes": part.bytes,
                }
                for part in parts
            },
        }

    def as_json(self) -> dict[str, Any]:
        """Every figure, for programs; bytes and parameters are integers."""
        towers = dict.fromkeys(part.tower for part in self.parts)
        c, item = self.config, self.config.item_bytes
        token, ssm, conv = kv_bytes_per_token(c, item), ssm_bytes(c), conv_bytes(c, item)
        return {
            "parameters": self.parameters,
            "bytes": self.bytes,
            "dtypes": dict(self.dtypes),
            "towers": {tower: self._tower_as_json(tower) for tower in towers},
            "parameters_per_layer": self.layer_parameters(),
            "kv_bytes_per_token": token,
            "kv_bytes_by_context": {n: n * token for n in CONTEXTS},
            "state_bytes_per_sequence": ssm + conv,
            "ssm_bytes_per_sequence": ssm,
            "conv_bytes_per_sequence": conv,
            "tokens_per_context_gigabyte": 10**9 // token if token else None,
            "logits_bytes_per_block": BLOCK * c.vocab_size * 4,
        }


def take_inventory(
    config: ModelConfig, tensors: Mapping[str, tuple[str, Sequence[int]]]
) -> Inventory:
    """Sort tensors, stored dtype and shape by name, into parts."""
    counts: Counter[tuple[Tower, str]] = Counter()
    parameters: Counter[tuple[Tower, str]] = Counter()
    sizes: Counter[tuple[Tower, str]] = Counter()
    base = not any(name.startswith("context_tower.") for name in tensors)
    for name, (dtype, shape) in tensors.items():
        part = part_of(config, name, base=base)
        counts[part] += 1
        parameters[part] += weights_in(name, dtype, tuple(shape))
        sizes[part] += math.prod(shape) * ITEM_SIZES[dtype]
    order: list[tuple[Tower, str]] = [("context", name) for name in PARTS]
    order += [("denoiser", name) for name in PARTS]
    return Inventory(
        config,
        tuple(
            Part(tower, name, counts[tower, name], parameters[tower, name], sizes[tower, name])
            for tower, name in order
            if counts[tower, name]
        ),
        dict(sorted(Counter(dtype for dtype, _ in tensors.values()).items())),
    )


def inventory_of(manifest: Manifest) -> Inventory:
    """Sizes of the towers that were exported."""
    used = {
        source
        for inputs in manifest.weights.values()
        for weight in inputs.values()
        for codes in weight.sources
        for source in (codes, *scale_names(codes, weight.dtype))
    }
    tensors = {n: (t.dtype, t.shape) for n, t in manifest.tensors.items() if n in used}
    return take_inventory(manifest.model, tensors)


@dataclass(frozen=True)
class Fit:
    """GPUs that could hold a model, by their names in the table.

    Attributes:
        one: One GPU holds everything that was exported.
        one_per_tower: A GPU per tower is needed, and enough; empty where there is one tower only.
    """

    one: tuple[str, ...]
    one_per_tower: tuple[str, ...]


def fitting_skus(inventory: Inventory) -> Fit:
    """GPUs whose memory holds the weights as stored and 4,096 tokens, with 5% left for workspace.

    A first look: `twotower plan` counts the workspace and the slots.
    """
    c, item = inventory.config, inventory.config.item_bytes
    context = ssm_bytes(c) + conv_bytes(c, item) + CONTEXTS[0] * kv_bytes_per_token(c, item)
    towers = dict.fromkeys(part.tower for part in inventory.parts)
    largest = max(inventory.bytes_of_tower(tower) for tower in towers)

    def holds(sku: Sku, weights: int) -> bool:
        return weights + context <= (sku.memory - sku.reserved) * (1 - WORKSPACE_SHARE)

    gpus = [sku for sku in known_skus().values() if sku.compute_capability is not None]
    one = tuple(sku.name for sku in gpus if holds(sku, inventory.bytes))
    pairs = [sku.name for sku in gpus if sku.max_gpus == 2 and holds(sku, largest)]
    two = tuple(name for name in pairs if name not in one)
    return Fit(one, two if len(towers) > 1 else ())
