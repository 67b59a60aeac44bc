"""The verb `twotower tiny`: writes a small checkpoint in the released layout."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import click

from twotower_contract.atomic import new_folder
from twotower_contract.errors import TwoTowerError
from twotower_export.progress import StepMeter

MOST_WEIGHTS = 2**28  # a gibibyte of float32

EPILOG = """\b
Examples:
  twotower tiny demo/checkpoint --pretrained    the trained one that twotower ships, at once
  twotower tiny my-checkpoint                   train one: a few minutes on two cores
  twotower tiny random --random --pattern ME*E --hidden 32 --seed 7 --dtype float32
"""


@click.command(epilog=EPILOG)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--pattern", help="Layers: M (Mamba), E (experts), * (attention).  [MEM*EM*E]")
@click.option("--hidden", type=int, help="Hidden size; every other size scales with it.  [64]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    help="Random seed; the same seed gives the same checkpoint.  [0]",
)
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float32"]), help="Dtype of the weights.  [bfloat16]"
)
@click.option(
    "--random",
    "is_random",
    is_flag=True,
    help="Write random weights: made at once, but they speak no text.",
)
@click.option(
    "--pretrained",
    "is_copy",
    is_flag=True,
    help="Copy the trained checkpoint that ships with the package.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tiny(
    out: Path,
    pattern: str | None,
    hidden: int | None,
    seed: int | None,
    dtype: str | None,
    is_random: bool,
    is_copy: bool,
    as_json: bool,
) -> None:
    """Write a small checkpoint to OUT in the layout of the released one.

    Without --random or --pretrained it is trained on a small text that twotower ships: the context
    tower autoregressively, then the denoiser by masked diffusion.
    """
    if is_random and is_copy:
        raise TwoTowerError("--random and --pretrained are both given: leave one of them out")
    if out.is_dir() and any(out.iterdir()):
        raise TwoTowerError(f"{out} is not empty: name another folder, or delete it first")
    given = {"pattern": pattern, "hidden": hidden, "seed": seed, "dtype": dtype}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    how = "random" if is_random else "pretrained" if is_copy else "trained"
    if is_copy:
        if options:
            raise TwoTowerError(
                f"--pretrained copies one fixed checkpoint, so --{next(iter(options))} means "
                "nothing: leave it out, or leave out --pretrained to train"
            )
        from twotower_export.tiny.checkpoints import copy_pretrained

        with new_folder(out, TwoTowerError) as made:
            copy_pretrained(made)
    elif is_random:
        from twotower_export.tiny.checkpoints import write_random_checkpoint

        _check_size(pattern, hidden)
        with new_folder(out, TwoTowerError) as made:
            write_random_checkpoint(made, **options)
    else:
        _check_size(pattern, hidden)
        with new_folder(out, TwoTowerError) as made:
            _train(made, options)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if as_json:
        click.echo(json.dumps({"checkpoint": str(out), "how": how, "bytes": size}))
    else:
        click.echo(f"{out}: {how} checkpoint, {size / 1e6:.1f} MB")


def _check_size(pattern: str | None, hidden: int | None) -> None:
    """Refuse sizes that are not tiny: all of it is held in memory, in float32."""
    from twotower_contract.layout import expected_tensors
    from twotower_export.tiny.checkpoints import DEFAULT_HIDDEN, DEFAULT_PATTERN, tiny_config

    config = tiny_config(
        DEFAULT_PATTERN if pattern is None else pattern,
        DEFAULT_HIDDEN if hidden is None else hidden,
    )
    count = sum(map(math.prod, expected_tensors(config).values()))
    if count > MOST_WEIGHTS:
        raise TwoTowerError(
            f"--hidden {config.hidden_size} with {len(config.pattern)} layers makes {count:.2g} "
            f"weights, and a tiny checkpoint has at most {MOST_WEIGHTS:.2g}: give a smaller "
            "--hidden or a shorter --pattern"
        )


def _train(out: Path, options: dict[str, Any]) -> None:
    from twotower_export.tiny.training import Recipe, write_trained_checkpoint

    meter, done, steps = StepMeter(), itertools.count(1), Recipe().steps

    def progress(tower: str, loss: float) -> None:
        meter(f"{tower}, loss {loss:.2f}; training step", next(done), steps)

    write_trained_checkpoint(out, **options, progress=progress)
    meter.finish()
