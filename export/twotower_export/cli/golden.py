"""The verb `twotower golden`: computes the answer that engines must give in the self-test."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time

import click

from twotower_contract.errors import TwoTowerError
from twotower_contract.golden import GOLDEN_FILE, write_golden
from twotower_export.checkpoint import open_checkpoint
from twotower_export.progress import StepMeter
from twotower_export.reference.golden import compute_golden, expected_work

EPILOG = """\b
Examples:
  twotower golden checkpoint
  twotower golden checkpoint --json
  twotower golden nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16@COMMIT

The towers are read layer by layer, so a model of any size needs only a few GB of memory, but every
call reads its weights again: a model of 30 B parameters takes hours. The answer is written to
CHECKPOINT/golden.json, and the next `twotower export` puts it into the bundle. A small model needs
no such file: export computes its answer. Exits with 2 where there is no answer, because the
checkpoint cannot be read or its logits hold NaN; after Ctrl-C nothing is written.
"""


@click.command(epilog=EPILOG)
@click.argument("checkpoint")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as one JSON object.")
def golden(checkpoint: str, as_json: bool) -> None:
    """Compute the golden answer of a CHECKPOINT with PyTorch in float32, and store it there.

    The golden answer is what `twotower selftest` and every server at its start expect from their
    engines: the tokens that follow a fixed prompt, and the number of denoiser calls. CHECKPOINT is
    a folder or a hub id, ORGANISATION/NAME[@REVISION].
    """
    start = time.monotonic()
    opened = open_checkpoint(checkpoint)
    if importlib.util.find_spec("torch") is None:
        raise TwoTowerError("PyTorch is not installed; pip install 'twotower[reference]'")
    if not os.access(opened.path, os.W_OK):
        raise TwoTowerError(f"{opened.path}: is not writable; run this where it is")
    mode = "mask_diffusion" if "denoiser" in opened.towers else "ar"
    print(expected_work(opened, mode), file=sys.stderr)
    meter = StepMeter()
    try:
        answer = compute_golden(opened, mode, meter)
    except FloatingPointError as problem:
        raise TwoTowerError(f"{opened.path}: {problem}; there is no golden answer") from problem
    finally:
        meter.finish()
    path = opened.path / GOLDEN_FILE
    write_golden(path, opened.fingerprint, answer)
    seconds = round(time.monotonic() - start, 2)
    if as_json:
        click.echo(json.dumps({"file": str(path), "seconds": seconds, "golden": answer}))
    else:
        tokens, calls = len(answer["output_ids"]), answer["denoiser_calls"]
        click.echo(f"{path}: {tokens} tokens in {calls} denoiser calls, {seconds} s")
