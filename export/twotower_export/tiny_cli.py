"""The verb `twotower tiny`: writes a small checkpoint in the released layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from twotower_export.errors import ExportError

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
@click.option("--seed", type=int, help="The same seed gives the same checkpoint.  [0]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), help="[bfloat16]")
@click.option("--random", "how", flag_value="random", help="Random weights: at once, no text.")
@click.option("--pretrained", "how", flag_value="pretrained", help="Copy the trained one.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def tiny(
    out: Path,
    pattern: str | None,
    hidden: int | None,
    seed: int | None,
    dtype: str | None,
    how: str | None,
    as_json: bool,
) -> None:
    """Write a small checkpoint to OUT in the layout of the released one.

    Without --random or --pretrained it is trained on a small text that twotower ships: the context
    tower autoregressively, then the denoiser by masked diffusion.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"{out} is not empty: name another folder, or delete it first")
    given = {"pattern": pattern, "hidden": hidden, "seed": seed, "dtype": dtype}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if how == "pretrained":
        if options:
            raise ExportError(
                f"--pretrained copies one fixed checkpoint, so --{next(iter(options))} means "
                "nothing: leave it out, or leave out --pretrained to train"
            )
        from twotower_export.tiny import copy_pretrained

        copy_pretrained(out)
    elif how == "random":
        from twotower_export.tiny import write_random_checkpoint

        write_random_checkpoint(out, **options)
    else:
        _train(out, options)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    if as_json:
        click.echo(json.dumps({"checkpoint": str(out), "how": how or "trained", "bytes": size}))
    else:
        click.echo(f"{out}: {how or 'trained'} checkpoint, {size / 1e6:.1f} MB")


def _train(out: Path, options: dict[str, Any]) -> None:
    from twotower_export.training import Recipe, write_trained_checkpoint

    def show(item: str | None) -> str | None:
        return item

    with click.progressbar(
        length=Recipe().steps, label="training", file=sys.stderr, item_show_func=show
    ) as bar:

        def progress(tower: str, loss: float) -> None:
            bar.update(1, f"{tower}, loss {loss:.2f}")

        write_trained_checkpoint(out, **options, progress=progress)
