"""One sequence on the PyTorch towers in float32, streamed layer by layer.

They need memory for one layer and a head, whatever the size of the model: weights are mapped, a
layer is filled when its turn comes and let go after it, and of its experts only those are read that
a token is routed to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from twotower_contract.layout import HEADS, Tower
from twotower_export.progress import silent
from twotower_export.reference.mapped import NamedTensors, OpenShards, load_module
from twotower_export.reference.mixers import Expert, Layer, RMSNorm
from twotower_export.reference.towers import (
    Call,
    Denoiser,
    States,
    advance_states,
    empty_states,
    on_meta,
    run_layer,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from twotower_export.checkpoint import Checkpoint

Progress = Callable[[Tower, int, int], None]
"""Called before a layer runs with its tower, its number, and the number of layers."""


class StreamedTowers:
    """The states of one sequence, and the towers that read and extend it.

    Args:
        capacity: Tokens that the sequence can reach.
        progress: Called before each layer runs.

    Attributes:
        calls: Calls of either tower begun so far.
        bytes_read: Bytes of stored weights that were computed with so far.
    """

    def __init__(self, checkpoint: Checkpoint, capacity: int, progress: Progress = silent) -> None:
        self.config = checkpoint.config
        self.states: States = empty_states(self.config, 1, capacity, torch.float32)
        self.length = 0
        self.calls = 0
        self.bytes_read = 0
        self._tensors = NamedTensors(checkpoint.path)
        self._progress = progress
        self._conditioning: Denoiser | None = None
        self._wide: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @torch.no_grad()
    def extend(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Append tokens to the context; returns the logits of the last, (vocab,).

        Raises:
            FloatingPointError: The logits hold NaN or infinity.
        """
        lengths, before = torch.tensor([len(ids)]), torch.tensor([self.length])
        call = Call(lengths, before, causal=torch.tensor([True]))
        hidden, new = self._run_layers("context", torch.tensor([list(ids)]), call)
        logits = self._run_head("context", hidden[:, -1])[0]
        self.states = advance_states(self.states, new, lengths, before)
        self.length += len(ids)
        return _finite(logits.numpy(), "context")

    @torch.no_grad()
    def denoise(self, block: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Return the logits of a block against the context, (block, vocab).

        Raises:
            FloatingPointError: The logits hold NaN or infinity.
        """
        ids, lengths = torch.from_numpy(block[None]), torch.tensor([len(block)])
        conditioning = self._time_conditioning()
        fraction = conditioning.masked_fraction(ids, lengths)
        modulation = conditioning.modulation(fraction, torch.tensor([True]))
        before = torch.tensor([self.length])
        call = Call(lengths, before, causal=torch.tensor([False]), modulation=modulation)
        hidden, _ = self._run_layers("denoiser", ids, call)
        return _finite(self._run_head("denoiser", hidden)[0].numpy(), "denoiser")

    def _run_layers(self, tower: Tower, ids: Tensor, call: Call) -> tuple[Tensor, States]:
        """Hidden states after the last layer, and what the layers emit."""
        self.calls += 1
        hidden = embedding(ids.long(), self._tensors.read(f"{tower}_tower.embeddings.weight"))
        hidden, emitted = hidden.float(), States()
        for index in range(self.config.num_layers):
            self._progress(tower, index, self.config.num_layers)
            # The module dies with this expression, and its weights are unmapped with it.
            hidden = run_layer(self._layer(tower, index), index, hidden, call, self.states, emitted)
        return hidden, emitted

    def _layer(self, tower: Tower, index: int) -> Layer:
        """Return a layer on its mapped weights; an expert is filled when it is called.

        The files stay open as long as the layer lives.
        """
        layer = on_meta(lambda: Layer(self.config, self.config.pattern[index]))
        prefix, opened = f"{tower}_tower.layers.{index}.", OpenShards()
        experts = {
            f"{name}.": one for name, one in layer.named_modules() if isinstance(one, Expert)
        }
        for name, expert in experts.items():
            expert.register_forward_pre_hook(partial(self._fill_expert, prefix + name, opened))
        names = [name for name in layer.state_dict() if not name.startswith(tuple(experts))]
        load_module(layer, {name: prefix + name for name in names}, self._tensors, opened)
        stored = layer.state_dict()
        self._count(stored[name] for name in names)
        return layer

    def _fill_expert(self, prefix: str, opened: OpenShards, expert: Any, given: object) -> None:
        """Read an expert that is about to be called, as float32 into memory that all share.

        Memory of its own for each would be fresh pages from the system every time, which takes ten
        times as long as the conversion.
        """
        state = {}
        stored = self._tensors.read_all((prefix + name for name in expert.state_dict()), opened)
        self._count(stored.values())
        for name, tensor in stored.items():
            name = name.removeprefix(prefix)
            key = (name, tuple(tensor.shape))
            if key not in self._wide:
                self._wide[key] = torch.empty(tensor.shape)
            state[name] = self._wide[key].copy_(tensor)
        expert.load_state_dict(state, assign=True)

    def _run_head(self, tower: Tower, hidden: Tensor) -> Tensor:
        """Apply final norm and head; hidden (..., hidden) -> float32 logits (..., vocab)."""
        config = self.config
        norm = on_meta(lambda: RMSNorm(config.hidden_size, config.norm_eps))
        load_module(norm, {"weight": f"{tower}_tower.norm_f.weight"}, self._tensors)
        head = self._tensors.read(HEADS[tower])
        self._count([head])
        return linear(norm(hidden), head.float())

    def _time_conditioning(self) -> Denoiser:
        """Return a denoiser with its time conditioning filled and layers without memory."""
        if self._conditioning is None:
            module = on_meta(lambda: Denoiser(self.config))
            parts = ("t_embedder.", "t_block.", "scale_shift_tables.")
            names = [name for name in module.state_dict() if name.startswith(parts)]
            load_module(module, {name: name for name in names}, self._tensors)
            self._conditioning = module
        return self._conditioning

    def _count(self, tensors: Iterable[Tensor]) -> None:
        self.bytes_read += sum(tensor.nbytes for tensor in tensors)


def _finite(logits: npt.NDArray[np.float32], tower: Tower) -> npt.NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"the {tower} tower's logits hold NaN or infinity")
    if not logits.any():
        raise FloatingPointError(f"the {tower} tower's logits are 0 everywhere")
    return logits
