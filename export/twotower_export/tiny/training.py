"""Trains a tiny checkpoint as the paper trains the real one, in a few minutes on two cores.

First the context tower learns the corpus autoregressively and is frozen. The denoiser starts as
its copy, with neutral time conditioning, and learns masked diffusion: of each block a uniformly
drawn share of positions is masked, and the cross-entropy of the masked tokens is minimised, given
the rest of the block and the context tower's states of strictly earlier tokens.

Sources: the TwoTower paper (arXiv 2606.26493), section on training, and its code in Megatron-LM,
`megatron/diffusion/two_tower/diffusion_process.py`, `MaskDiffusionProcess`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from twotower_export.progress import silent
from twotower_export.reference.mixers import Router, project
from twotower_export.reference.towers import (
    ContextTower,
    Denoiser,
    States,
    Towers,
    advance_states,
    empty_states,
)
from twotower_export.tiny.checkpoints import Dtype, random_tensors, tiny_config, write_checkpoint
from twotower_export.tiny.corpus import documents
from twotower_export.tiny.tokenizer import END_ID, MASK_ID, tokenizer_files, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from twotower_contract.config import ModelConfig

WORKERS = 2
"""Threads that share each step; fixed, because it is part of what a seed gives."""

Progress = Callable[[str, float], None]
"""Called after every step with the tower in training and the loss, nats per token."""


README = """A tiny checkpoint in the layout of NVIDIA's Nemotron-Labs-TwoTower, trained by

    twotower tiny OUT --pattern '{pattern}' --hidden {hidden} --seed {seed} --dtype {dtype}

on the templates in `twotower_export/tiny/corpus.py` (written for this project, Apache-2.0).

recipe: {recipe}
losses at the end, nats per token: {losses}
torch {torch}
"""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        rows: Documents per step of each worker.
        context_steps: Steps of the context tower.
        denoiser_steps: Steps of the denoiser.
        context_rate: Peak learning rate of the context tower.
        denoiser_rate: Peak learning rate of the denoiser.
        block: Positions per block.
        masks_per_document: Steps of the denoiser that share one pass of the context tower.
        balance: How far one step moves the routers' correction of an expert's load.
    """

    rows: int = 8
    context_steps: int = 320
    denoiser_steps: int = 1200
    context_rate: float = 8e-3
    denoiser_rate: float = 8e-3
    block: int = 16
    masks_per_document: int = 3
    balance: float = 2e-3

    @property
    def steps(self) -> int:
        """All steps of both towers."""
        return self.context_steps + self.denoiser_steps


def train(
    config: ModelConfig,
    tokenizer: Tokenizer,
    seed: int = 0,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Train both towers and returns every tensor of the checkpoint, float32.

    Every step is shared by two workers, however many cores there are, so that equal seeds give
    equal results on equal machines; another processor may sum in another order and end elsewhere.

    Args:
        seed: Seed of the weights, the documents and the masks.
    """
    recipe = recipe or Recipe()
    towers = _initial_towers(config, seed)
    workers = [_Worker(tokenizer, recipe, seed, number) for number in range(WORKERS)]

    def context_part(worker: _Worker) -> Tensor:
        return context_loss(towers.context, config, *next(worker.rows))

    def denoiser_part(worker: _Worker) -> Tensor:
        return denoiser_loss(towers, worker.blocks(towers, recipe), worker.draws)

    threads = torch.get_num_threads()
    # Idle OpenMP threads spin, which on a machine that others use costs tenfold: each worker is
    # one thread.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            step = _Optimiser(towers.context, recipe.context_rate, recipe.context_steps, recipe)
            for _ in range(recipe.context_steps):
                progress("context tower", step(pool, context_part, workers))
            towers.context.requires_grad_(False)
            _start_as_copy(towers)
            step = _Optimiser(towers.denoiser, recipe.denoiser_rate, recipe.denoiser_steps, recipe)
            for _ in range(recipe.denoiser_steps):
                progress("denoiser", step(pool, denoiser_part, workers))
    finally:
        torch.set_num_threads(threads)
    return {**towers.context.state_dict(), **towers.denoiser.state_dict()}


class _Worker:
    """The draws of one thread: its own documents and its own masks."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, seed: int, number: int) -> None:
        own = seed * WORKERS + number
        self.rows = batches(tokenizer, recipe, own)
        self.draws = torch.Generator().manual_seed(own)
        self.used, self.cut = 0, cast(Blocks, None)

    def blocks(self, towers: Towers, recipe: Recipe) -> Blocks:
        """Cut documents into blocks; the same ones again until they were used up."""
        if self.used % recipe.masks_per_document == 0:
            ids, lengths = next(self.rows)
            # Mostly blocks after the opening, which nothing could predict; some from an empty
            # context.
            offsets = torch.randint(2 * recipe.block, lengths.shape, generator=self.draws)
            offsets = offsets.minimum(lengths - 1)
            self.cut = context_of_blocks(towers, ids, lengths, offsets, recipe.block)
        self.used += 1
        return self.cut


def batches(tokenizer: Tokenizer, recipe: Recipe, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids (rows, length) and lengths (rows,) of documents, each from an empty context.

    Every document ends with the end token, and is filled with it to the width of the batch plus
    one block, so that a denoiser learns to fill the rest of a last block. A length counts the
    first end token.
    """
    choose = random.Random(seed)
    drawn = documents("train", seed)
    while True:
        texts = []
        for _ in range(recipe.rows):
            document = next(drawn)
            texts.append(document.prompt + choose.choice(document.answers))
        encoded = [[*row.ids, END_ID] for row in tokenizer.encode_batch(texts)]
        width = max(map(len, encoded)) + recipe.block
        filled = [row + [END_ID] * (width - len(row)) for row in encoded]
        yield torch.tensor(filled), torch.tensor([len(row) for row in encoded])


def context_loss(tower: ContextTower, config: ModelConfig, ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token of the documents."""
    states = empty_states(config, len(ids), 1, torch.float32)
    hidden, _ = tower.every_position(ids[:, :-1], lengths, torch.zeros_like(lengths), states)
    # Also one end token after the first, so that what follows an end is an end.
    wanted = torch.arange(hidden.shape[1]) < lengths[:, None]
    return cross_entropy(project(hidden[wanted], tower.context_lm_head), ids[:, 1:][wanted])


class Blocks(NamedTuple):
    """Blocks of documents with the context tower's states before each.

    Attributes:
        ids: (n, block).
        context_lengths: (n,), tokens before each block.
        states: The states of each block, see :mod:`twotower_export.reference.towers`.
    """

    ids: Tensor
    context_lengths: Tensor
    states: States


def denoiser_loss(towers: Towers, blocks: Blocks, draws: torch.Generator) -> Tensor:
    """Return the mean cross-entropy of the masked tokens, masks drawn anew.

    `corrupt_suffix` and `training_loss` of Megatron's `MaskDiffusionProcess` (the mean is not
    weighted by 1/t). There t is drawn from [0.001, 1] and each position is masked with probability
    t; here the number of masked positions is drawn.
    """
    count, size = blocks.ids.shape
    # t is uniform, and is what the denoiser sees at inference: a share of the block's positions.
    masks = torch.randint(1, size + 1, (count, 1), generator=draws)
    masked = torch.rand(blocks.ids.shape, generator=draws).argsort(-1).argsort(-1) < masks
    logits = towers.denoiser(
        blocks.ids.masked_fill(masked, MASK_ID),
        torch.full_like(blocks.context_lengths, size),
        blocks.context_lengths,
        torch.ones_like(blocks.context_lengths),
        blocks.states,
    )
    return cross_entropy(logits[masked], blocks.ids[masked])


@torch.no_grad()
def context_of_blocks(
    towers: Towers, ids: Tensor, lengths: Tensor, offsets: Tensor, block: int
) -> Blocks:
    """Cut documents into blocks and gives each the context tower's states before it.

    A block sees the context of strictly earlier blocks, and the first one zero states (Megatron's
    `mamba_model.py`).

    Args:
        ids: (rows, length).
        lengths: (rows,); blocks that begin at or after it are left out.
        offsets: (rows,), where the first block of a row begins: prompts have any length.
    """
    count = math.ceil(int((lengths - offsets).max()) / block)
    width = int(offsets.max()) + count * block
    ids = torch.cat([ids, ids[:, -1:].expand(-1, max(0, width - ids.shape[1]))], dim=1)
    states = empty_states(towers.config, len(ids), width, torch.float32)
    starts, sizes = torch.zeros_like(offsets), offsets
    called = ids[:, : max(1, int(offsets.max()))]
    pieces: list[tuple[Tensor, Tensor, States]] = []
    for _ in range(count):
        _, emitted = towers.context.every_position(called, sizes, starts, states)
        states = advance_states(states, emitted, sizes, starts)
        starts, sizes = starts + sizes, torch.full_like(sizes, block)
        called = ids.gather(1, starts[:, None] + torch.arange(block))
        pieces.append((called, starts, states))
    inside = torch.cat([starts < lengths for _, starts, _ in pieces])
    # The newest caches serve every block: what came later lies beyond its context length.
    newest = pieces[-1][2]
    gathered = {
        name: torch.cat([(newest if "_cache" in name else own)[name] for _, _, own in pieces])
        for name in newest
    }
    return Blocks(
        torch.cat([piece for piece, _, _ in pieces])[inside],
        torch.cat([starts for _, starts, _ in pieces])[inside],
        {name: tensor[inside] for name, tensor in gathered.items()},
    )


def _initial_towers(config: ModelConfig, seed: int) -> Towers:
    # Small logits: a fresh model should find every token about equally likely.
    tensors = random_tensors(config, seed, logit_scale=0.5)
    for name, tensor in tensors.items():
        if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
            tensor *= 1 / math.sqrt(2 * config.num_layers)
        elif name.endswith("e_score_correction_bias"):
            tensor.zero_()
    towers = Towers(config, ContextTower(config), Denoiser(config))
    for tower in (towers.context, towers.denoiser):
        tower.load_state_dict({name: tensors[name] for name in tower.state_dict()})
    return towers


def _start_as_copy(towers: Towers) -> None:
    """Make the denoiser the context tower's copy, with conditioning that changes nothing yet."""
    context, denoiser = towers.context, towers.denoiser
    denoiser.denoiser_tower.load_state_dict(context.context_tower.state_dict())
    denoiser.lm_head.load_state_dict(context.context_lm_head.state_dict())
    with torch.no_grad():
        for parameter in denoiser.t_block.parameters():
            parameter.zero_()
        for table in denoiser.scale_shift_tables:
            table.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None])


class _Optimiser:
    """AdamW with warm-up and linear decay, and the balancing of the experts' load."""

    def __init__(self, module: nn.Module, rate: float, steps: int, recipe: Recipe) -> None:
        self.parameters, self.balance = list(module.parameters()), recipe.balance
        self.adam = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        warm_up = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam,
            lambda step: min(
                (step + 1) / warm_up, max(0.01, (steps - step) / max(1, steps - warm_up))
            ),
        )
        self.chosen: list[tuple[Router, Tensor]] = []
        for part in module.modules():
            if isinstance(part, Router):
                part.register_forward_hook(self._count)

    def __call__(
        self,
        pool: ThreadPoolExecutor,
        part: Callable[[_Worker], Tensor],
        workers: Sequence[_Worker],
    ) -> float:
        """Take one step along the mean gradient of the workers' parts; the mean loss."""

        def gradients(worker: _Worker) -> tuple[float, tuple[Tensor | None, ...]]:
            loss = part(worker)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return loss.item(), found

        results = list(pool.map(gradients, workers))
        for parameter, *found in zip(self.parameters, *(own for _, own in results), strict=True):
            given = [gradient for gradient in found if gradient is not None]
            # An expert that no token chose has no gradient.
            parameter.grad = torch.stack(given).sum(0) / len(found) if given else None
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()
        self._balance()
        return sum(loss for loss, _ in results) / len(results)

    def _count(self, router: nn.Module, _: Any, output: tuple[Tensor, Tensor]) -> None:
        self.chosen.append((cast(Router, router), output[0].flatten()))

    def _balance(self) -> None:
        """Move the correction of each expert towards an equal load.

        No auxiliary loss is needed: the correction only selects, so it may be moved by hand
        (Wang et al. 2024, "Auxiliary-loss-free load balancing").
        """
        loads: dict[Router, Tensor] = {}
        for router, chosen in self.chosen:
            load = torch.bincount(chosen, minlength=len(router.e_score_correction_bias))
            loads[router] = loads.get(router, torch.zeros(())) + load
        for router, load in loads.items():
            router.e_score_correction_bias += self.balance * torch.sign(load.mean() - load)
        self.chosen.clear()


def write_trained_checkpoint(
    out: str | Path,
    pattern: str = "MEM*EM*E",
    hidden: int = 64,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    *,
    recipe: Recipe | None = None,
    progress: Progress = silent,
) -> ModelConfig:
    """Train a checkpoint and writes it in the released layout.

    The other arguments are those of :func:`tiny_config` and :func:`train`.

    Args:
        dtype: Dtype of the stored tensors; training is float32.

    Returns:
        The configuration.
    """
    recipe = recipe or Recipe()
    config = tiny_config(pattern, hidden, dtype)
    tokenizer = train_tokenizer(config.vocab_size)
    losses: dict[str, list[float]] = {}

    def record(tower: str, loss: float) -> None:
        losses.setdefault(tower, []).append(loss)
        progress(tower, loss)

    tensors = train(config, tokenizer, seed, recipe, record)
    readme = README.format(
        pattern=pattern,
        hidden=hidden,
        seed=seed,
        dtype=dtype,
        recipe=recipe,
        torch=torch.__version__,
        losses=", ".join(
            f"{tower} {sum(last) / len(last):.3f}"
            for tower, last in ((name, values[-20:]) for name, values in losses.items())
        ),
    )
    files = {"README.md": readme, **tokenizer_files(tokenizer)}
    write_checkpoint(out, config, tensors, shards=2, texts=files)
    return config
