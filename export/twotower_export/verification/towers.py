"""The PyTorch towers' side of a comparison: a whole tower, or one part of it.

Tensors are read by name through safetensors, not through the manifest, so that a wrong offset or a
swapped tensor in it shows up as a difference. A part computes on weights as they are stored,
mapped: of a full-size layer only the experts that are routed to are ever read. In bfloat16 the
modules round where NVIDIA's do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from twotower_contract.config import ModelConfig
from twotower_contract.layout import HEADS, Tower
from twotower_export.reference.mapped import NamedTensors, load_module, load_tower
from twotower_export.reference.mixers import Layer, RMSNorm, Router, project
from twotower_export.reference.towers import Call, Denoiser, advance_states, on_meta, run_layer
from twotower_export.verification.calls import NEW_STATES
from twotower_export.verification.graphs import HIDDEN, Part, embeddings_name, hidden_names

Array = npt.NDArray[Any]


def as_given(feed: Mapping[str, Array], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a call's inputs for a tower that computes in a dtype."""
    given = {name: torch.from_numpy(value) for name, value in feed.items()}
    narrow = (HIDDEN, "conv_state", "k_cache", "v_cache")
    return {
        name: value.to(dtype) if name.rpartition(".")[2] in narrow else value
        for name, value in given.items()
    }


def watch_routing(module: nn.Module, margins: list[float]) -> None:
    """Append, each time a router chooses, the least distance of a chosen expert to a refused one.

    Args:
        module: With routers somewhere inside.
        margins: Appended to; in units of the corrected sigmoid scores.
    """

    def record(router: nn.Module, given: tuple[Tensor, ...], chosen: tuple[Tensor, ...]) -> None:
        assert isinstance(router, Router)
        scores = torch.nn.functional.linear(given[0].float(), router.weight.float()).sigmoid()
        ranked = (scores + router.e_score_correction_bias.float()).sort(descending=True).values
        count = chosen[0].shape[1]
        if count < ranked.shape[1]:
            margins.append(float((ranked[:, count - 1] - ranked[:, count]).min()))

    for router in module.modules():
        if isinstance(router, Router):
            router.register_forward_hook(record)


@dataclass
class _Side:
    """A tower's modules; they are there between `open` and `close`.

    Attributes:
        margins: Receives, per MoE layer and call, how far the router was from another choice.
    """

    config: ModelConfig
    tower: Tower
    tensors: NamedTensors
    margins: list[float] = field(default_factory=list, kw_only=True)
    name: str = field(default="torch", init=False)
    _module: Any = field(default=None, init=False)

    def close(self) -> None:
        """Free the modules and unmap their weights."""
        self._module = None


@dataclass
class TowerSide(_Side):
    """A whole tower in float32.

    Attributes:
        layers: Layers whose hidden states to return as well.
    """

    layers: Sequence[int] = ()

    def open(self) -> None:
        """Load the tower."""
        self._module = load_tower(self.config, self.tower, self.tensors)
        watch_routing(self._module, self.margins)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run a call; the denoiser gives logits, the context tower its new states as well."""
        given = {name: torch.from_numpy(value) for name, value in feed.items()}
        rows = [given[name] for name in ("ids", "lengths", "context_lengths")]
        with torch.no_grad():
            if self.tower == "context":
                logits, outputs = self._module(*rows, given)
            else:
                logits, outputs = self._module(*rows, given["conditioned"], given), {}
            outputs = {"logits": logits, **_new_states(self.tower, given, outputs)}
            if self.layers:
                outputs |= self._hidden(given)
        return {name: value.numpy() for name, value in outputs.items()}

    def _hidden(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Hidden states after the layers asked for."""
        body = self._module.get_submodule(f"{self.tower}_tower")
        call = _call(given, self._module if self.tower == "denoiser" else None)
        hidden = embedding(given["ids"].long(), body.embeddings.weight)
        found: dict[str, Tensor] = {}
        for index, layer in enumerate(body.layers):
            hidden = run_layer(layer, index, hidden, call, given, {})
            if index in self.layers:
                found[hidden_names(self.tower, [index])[0]] = hidden
        return found


@dataclass
class TowerPartSide(_Side):
    """One part of a tower, on weights as they are stored.

    Attributes:
        part: The part.
        dtype: The dtype that it computes in, where the modules do not say float32.
    """

    part: Part
    dtype: torch.dtype

    def open(self) -> None:
        """Map the part's weights."""
        body, part = f"{self.tower}_tower", self.part
        if part == "embeddings":
            self._module = self.tensors.read(f"{body}.embeddings.weight")
        elif part == "head":
            self._module = on_meta(lambda: _Head(self.config))
            names = {"norm.weight": f"{body}.norm_f.weight", "head.weight": HEADS[self.tower]}
            load_module(self._module, names, self.tensors)
        elif self.tower == "context":
            kind = self.config.pattern[part]
            self._module = on_meta(lambda: Layer(self.config, kind))
            names = {name: f"{body}.layers.{part}.{name}" for name in self._module.state_dict()}
            load_module(self._module, names, self.tensors)
        else:
            single = replace(self.config, pattern=self.config.pattern[part])
            self._module = on_meta(lambda: Denoiser(single))
            load_module(self._module, self._denoiser_names(part), self.tensors)
            # The modulation takes its dtype from the embeddings, which stay on meta.
            self._module.denoiser_tower.embeddings.to(self.dtype)
        if isinstance(self._module, nn.Module):
            watch_routing(self._module, self.margins)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run a call of the part; all outputs come in float32."""
        with torch.no_grad():
            outputs = self._run(as_given(feed, self.dtype))
        return {name: value.float().numpy() for name, value in outputs.items()}

    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.part == "embeddings":
            rows = embedding(given["ids"].long(), self._module).to(self.dtype)
            return {embeddings_name(self.tower): rows}
        hidden = given[HIDDEN]
        if self.part == "head":
            if self.tower == "context":  # of each row's last valid token only
                last = (given["lengths"].long() - 1).clamp(min=0)
                hidden = hidden[torch.arange(len(last)), last]
            return {"logits": self._module(hidden)}
        (name,) = hidden_names(self.tower, [self.part])
        emitted: dict[str, Tensor] = {}
        if self.tower == "context":
            call = _call(given, None)
            hidden = run_layer(self._module, self.part, hidden, call, given, emitted)
            return {name: hidden, **_new_states(self.tower, given, emitted)}
        # A denoiser of this one layer: it is layer 0 there, and so are its states.
        renamed = {
            key.replace(f"layers.{self.part}.", "layers.0."): value for key, value in given.items()
        }
        (layer,) = self._module.denoiser_tower.layers
        hidden = run_layer(layer, 0, hidden, _call(given, self._module), renamed, emitted)
        return {name: hidden, **_new_states(self.tower, given, {})}

    def _denoiser_names(self, part: int) -> dict[str, str]:
        """Map a one-layer denoiser's parameters to checkpoint tensors; its ends stay on meta."""
        names: dict[str, str] = {}
        for name in self._module.state_dict():
            if name.startswith("denoiser_tower.layers.0."):
                names[name] = name.replace("layers.0.", f"layers.{part}.", 1)
            elif name.startswith(("t_embedder.", "t_block.")):
                names[name] = name
        return names | {"scale_shift_tables.0": f"scale_shift_tables.{part}"}


def _new_states(
    tower: Tower, given: Mapping[str, Tensor], emitted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the states after a call, by the names of the graph's outputs.

    Args:
        emitted: New states of the context tower; the denoiser leaves the context's as they are.
    """
    after = advance_states(given, emitted, given["lengths"], given["context_lengths"])
    outputs = {new for kind in NEW_STATES[tower].values() for new in kind}
    named = {f"{name}_new": value for name, value in after.items()}
    return {name: value for name, value in named.items() if name.rpartition(".")[2] in outputs}


class _Head(nn.Module):
    """Final norm and head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return project(self.norm(hidden), self.head).float()


def _call(given: Mapping[str, Tensor], denoiser: Denoiser | None) -> Call:
    """Return the inputs that a call's layers share; with a denoiser, its modulation."""
    lengths = given["lengths"]
    if denoiser is None:
        causal = torch.ones_like(lengths, dtype=torch.bool)
        return Call(lengths, given["context_lengths"], causal)
    on = given["conditioned"].bool()
    modulation = denoiser.modulation(denoiser.masked_fraction(given["ids"], lengths), on)
    return Call(lengths, given["context_lengths"], ~on, modulation)
