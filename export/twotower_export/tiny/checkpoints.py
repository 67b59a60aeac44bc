"""Small checkpoints in the released layout: random ones of any shape, and the trained one we ship.

A tiny checkpoint has the released one's ``config.json`` keys, tensor names, safetensors shards
with an index, and a tokenizer whose id 3 is the mask; everything that reads it reads the real one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from twotower_contract.atomic import partial_file, write_text
from twotower_contract.config import CONFIG_FILE, ModelConfig, config_json
from twotower_contract.errors import TwoTowerError
from twotower_contract.json_file import write_json
from twotower_contract.layout import expected_tensors
from twotower_export.tiny.tokenizer import (
    END_ID,
    MASK_ID,
    SMALLEST_VOCABULARY,
    corpus_tokenizer_files,
)

if TYPE_CHECKING:
    import torch

Dtype = Literal["bfloat16", "float32"]

DEFAULT_PATTERN = "MEM*EM*E"
DEFAULT_HIDDEN = 64
DEFAULT_VOCABULARY = 848


class TinyError(TwoTowerError):
    """A tiny checkpoint that cannot be made as asked."""


def tiny_config(
    pattern: str = DEFAULT_PATTERN,
    hidden: int = DEFAULT_HIDDEN,
    dtype: Dtype = "bfloat16",
    **sizes: Any,
) -> ModelConfig:
    """Return a configuration in which every size scales with ``hidden``.

    Args:
        pattern: Layer kinds, letters of M (Mamba), E (experts) and * (attention).
        hidden: Hidden size, at least 8.
        dtype: Dtype of the stored tensors.
        **sizes: Fields of :class:`ModelConfig` to set otherwise, for example ``num_experts=5``.

    Raises:
        ConfigError: If the pattern or a size makes no model.
        TinyError: If the vocabulary has no room for the bytes.
    """
    if hidden < 8:
        raise TinyError(f"hidden size is {hidden}: use at least 8")
    config = ModelConfig(
        vocab_size=DEFAULT_VOCABULARY,
        hidden_size=hidden,
        pattern=pattern,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=max(4, hidden // 4),
        mamba_num_heads=8,
        mamba_head_dim=max(2, hidden // 4),
        n_groups=2,
        ssm_state_size=max(4, hidden // 4),
        conv_kernel=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=hidden,
        shared_intermediate_size=2 * hidden,
        routed_scaling_factor=2.5,
        max_position_embeddings=4096,
        mask_token_id=MASK_ID,
        eos_token_ids=(END_ID,),
        dtype=dtype,
        source="tiny checkpoint",
    )
    config = replace(config, **sizes)
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise TinyError(
            f"vocab_size is {config.vocab_size}: the bytes and special tokens "
            f"need at least {SMALLEST_VOCABULARY}"
        )
    return config


def random_tensors(
    config: ModelConfig, seed: int, logit_scale: float = 4.0
) -> dict[str, torch.Tensor]:
    """Draw every tensor of a checkpoint, float32, at scales that keep activations near one.

    Args:
        logit_scale: Standard deviation of the logits; 4 spreads confidences over 0 to 1, so that
            thresholds matter.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: _draw(name, tuple(shape), generator, logit_scale)
        for name, shape in expected_tensors(config).items()
    }


def _draw(
    name: str, shape: tuple[int, ...], generator: torch.Generator, logit_scale: float
) -> torch.Tensor:
    import torch

    def normal(mean: float, deviation: float) -> torch.Tensor:
        return mean + deviation * torch.randn(shape, generator=generator)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    if name.endswith("dt_bias"):
        # As Mamba initialises it: softplus(dt_bias) is log-uniform in [0.001, 0.1].
        steps = uniform(math.log(0.001), math.log(0.1)).exp()
        return torch.log(torch.expm1(steps))
    rules: tuple[tuple[str, Callable[[], torch.Tensor]], ...] = (
        ("A_log", lambda: uniform(0.0, math.log(16.0))),
        (".D", lambda: normal(1.0, 0.1)),
        ("norm.weight", lambda: normal(1.0, 0.1)),
        ("norm_f.weight", lambda: normal(1.0, 0.1)),
        ("e_score_correction_bias", lambda: normal(0.0, 0.1)),
        ("conv1d.weight", lambda: normal(0.0, 0.5)),
        ("embeddings.weight", lambda: normal(0.0, 1.0)),
        ("lm_head.weight", lambda: normal(0.0, logit_scale / math.sqrt(shape[-1]))),
        # Moderate, so that t changes the logits without drowning the tokens.
        ("t_block.1.weight", lambda: normal(0.0, 0.5 / math.sqrt(shape[-1]))),
        ("bias", lambda: normal(0.0, 0.1)),
    )
    if name.startswith("scale_shift_tables"):
        table = normal(0.0, 0.3)
        table[2] += 1.0  # the gate is used as it is
        return table
    for suffix, draw in rules:
        if name.endswith(suffix):
            return draw()
    return normal(0.0, 1.0 / math.sqrt(shape[-1]))


def write_random_checkpoint(
    out: str | Path,
    pattern: str = DEFAULT_PATTERN,
    hidden: int = DEFAULT_HIDDEN,
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    *,
    shards: int = 3,
    float32_suffixes: Sequence[str] = (),
    logit_scale: float = 4.0,
    **sizes: Any,
) -> ModelConfig:
    """Write a checkpoint of random weights in the released layout.

    The other arguments are those of :func:`tiny_config` and :func:`random_tensors`.

    Args:
        float32_suffixes: Ends of tensor names that are stored as float32 nevertheless, for
            example ``("A_log", "mixer.D")``.

    Returns:
        The configuration.

    Raises:
        ConfigError: If the pattern or a size makes no model.
        TinyError: If the vocabulary has no room for the bytes.
    """
    config = tiny_config(pattern, hidden, dtype, **sizes)
    tensors = random_tensors(config, seed, logit_scale)
    write_checkpoint(out, config, tensors, shards=shards, float32_suffixes=float32_suffixes)
    return config


def write_checkpoint(
    out: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int = 3,
    float32_suffixes: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write configuration, tensors and further files in the released layout.

    Args:
        config: The model; ``config.dtype`` is the dtype of the stored tensors.
        tensors: All tensors by name, of any floating dtype.
        float32_suffixes: Ends of tensor names that are stored as float32 nevertheless.
        texts: Further files by name; by default those of a tokenizer trained on the corpus.
    """
    import torch

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stored_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]
    stored = {
        name: tensor.detach()
        .to(torch.float32 if name.endswith(tuple(float32_suffixes)) else stored_dtype)
        .contiguous()
        for name, tensor in tensors.items()
    }
    if texts is None:
        texts = corpus_tokenizer_files(config.vocab_size)
    for name, text in texts.items():
        write_text(folder / name, text)
    _write_shards(folder, stored, shards)
    # Last, because a folder with a config.json looks like a whole checkpoint.
    write_json(folder / CONFIG_FILE, config_json(config))


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    from safetensors.torch import save_file

    names = list(tensors)
    size = math.ceil(len(names) / shards)
    files: dict[str, list[str]] = {}
    count = math.ceil(len(names) / size)
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        files[file] = names[number * size : (number + 1) * size]
    for file, members in files.items():
        with partial_file(folder / file) as partial:
            save_file({name: tensors[name] for name in members}, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes private files; a server may be another user
    index = {
        "metadata": {"total_size": sum(t.numel() * t.element_size() for t in tensors.values())},
        "weight_map": {name: file for file, members in files.items() for name in members},
    }
    write_json(folder / "model.safetensors.index.json", index)


def copy_pretrained(out: str | Path) -> None:
    """Copy the trained checkpoint that this package ships; needs neither torch nor time.

    Raises:
        TinyError: If the package was installed without its data.
    """
    folder = Path(out)
    with resources.as_file(resources.files("twotower_export") / "data" / "tiny") as source:
        if not (source / CONFIG_FILE).is_file():
            raise TinyError(
                f"the trained checkpoint is missing from {source}: install twotower again, or "
                f"train one with `twotower tiny {folder}`"
            )
        folder.mkdir(parents=True, exist_ok=True)
        # config.json last: a folder that has it looks like a whole checkpoint.
        for file in sorted(source.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            with partial_file(folder / file.name) as partial:
                shutil.copyfile(file, partial)
