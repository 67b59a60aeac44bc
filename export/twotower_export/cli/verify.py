"""The verb `twotower verify`: exported graphs and engines against a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower_contract.errors import TwoTowerError

if TYPE_CHECKING:
    from twotower_export.verification.comparison import Comparison, TensorDifference
    from twotower_export.verification.graphs import Part
    from twotower_export.verification.verify import Report

EPILOG = """\b
Examples:
  twotower verify bundle checkpoint                  every output of both graphs
  twotower verify bundle checkpoint --layers         the hidden states after every layer as well
  twotower verify bundle checkpoint --layer 5        after layer 5; of a large model, only layer 5
  twotower verify bundle checkpoint --part head      only the head and the refinement
  twotower verify engines checkpoint --json          an engine set; one JSON object
  twotower verify engines checkpoint --bundle bundle   engines for a GPU, on any machine

A model whose towers do not fit into memory in float32 is verified part by part, in less than 8 GB.
Graphs in bfloat16 always are, with every value rounded as it says.
Exits with 1 where something differs. Engines for a GPU are verified as far as this machine can.
"""

LISTED_AT_MOST = 10


def _part(text: str) -> int | str:
    """Read `embeddings`, `head` or the number of a layer."""
    try:
        return text if text in ("embeddings", "head") else int(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither embeddings, head nor a layer's number"
        ) from None


class VerificationError(TwoTowerError):
    """Graphs do not compute what the reference computes."""

    exit_code = 1


@click.command(epilog=EPILOG)
@click.argument("target", metavar="BUNDLE|ENGINES", type=click.Path(path_type=Path))
@click.argument("checkpoint", metavar="CHECKPOINT", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Choice(["torch"]),
    default="torch",
    help="Reference to compare with: the towers as PyTorch modules, in each graph's precision.",
)
@click.option("--layers", "every_layer", is_flag=True, help="Compare after every layer as well.")
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="Compare after this layer as well. Repeatable.",
)
@click.option(
    "--part",
    "parts",
    type=_part,
    metavar="PART",
    multiple=True,
    help="Verify only this part of each tower: embeddings, head or a layer's number. Repeatable.",
)
@click.option("--sku", help="SKU of the engines, where ENGINES holds several.")
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="For engines of a GPU: the bundle that they were built from; TensorRT parses its graphs.",
)
@click.option(
    "--against",
    metavar="CPU_ENGINES",
    type=click.Path(path_type=Path),
    help="Engines for a GPU, on that GPU: CPU engines of the same model to compare with.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(
    target: Path,
    checkpoint: Path,
    reference: str,
    every_layer: bool,
    layers: tuple[int, ...],
    parts: tuple[Part, ...],
    sku: str | None,
    bundle: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    """Compare every output of the exported graphs with a reference.

    Inputs are random, of the shapes that serving has: a prefill chunk, a block, a single token,
    rows of different lengths. BUNDLE or ENGINES is what is verified, CHECKPOINT (folder or hub id)
    what it was exported from.
    """
    from twotower_contract.engine_set import find_engine_sets, open_engine_set
    from twotower_export.verification.target import open_target

    engines = open_engine_set(target, sku) if find_engine_sets(target) else None
    if engines is not None and engines.build.flavour != "onnxruntime":
        if every_layer or layers or parts:
            raise TwoTowerError(
                f"{engines.folder}: plans cannot be read layer by layer; verify the bundle with "
                "--layers, --layer or --part"
            )
        given = click.get_current_context().get_parameter_source("reference")
        if given is click.core.ParameterSource.COMMANDLINE:
            raise TwoTowerError(
                f"{engines.folder}: plans are compared with the CPU flavour; leave out "
                "--reference, or verify the bundle with it"
            )
        from twotower_engines.cli.verify import verify_device_engines

        verify_device_engines(engines, checkpoint, bundle, against, as_json)
        return
    if bundle is not None or against is not None:
        raise TwoTowerError("--bundle and --against are for engines for a GPU; leave them out here")
    opened = open_target(target if engines is None else engines)

    from twotower_export.verification.verify import verify as compare

    if every_layer:
        layers = tuple(range(opened.manifest.model.num_layers))

    def say(part: str) -> None:
        click.echo(f"comparing {part}", err=True)

    report = compare(opened, checkpoint, layers=layers, parts=parts, progress=say)
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        _print(report)
    if not report.outcome.passed:
        raise VerificationError(_reason(report, bool(layers or parts)))


def _print(report: Report) -> None:
    """Print one line per part, what failed, the worst tensor, and what was not verified.

    Where a model's float32 graphs were verified whole, the parts in its own dtype share a line.
    """
    outcome = report.outcome
    click.echo(f"{report.target} against {report.checkpoint} (PyTorch)")
    lines: dict[tuple[str, str], list[TensorDifference]] = {}
    for tensor in outcome.tensors:
        part = tensor.part if report.by_part else tensor.part.partition(".")[0]
        lines.setdefault((part, tensor.precision), []).append(tensor)
    for (part, precision), tensors in lines.items():
        calls = len({tensor.call for tensor in tensors})
        failed = sum(not tensor.passed for tensor in tensors)
        worst = max(tensors, key=lambda tensor: tensor.severity)
        state = f"{failed} FAILED" if failed else "ok"
        click.echo(
            f"  {part:22} {precision:9} {len(tensors):4} tensors of {calls} calls  {state:10} "
            f"worst {worst.max_rel:.1e} ({worst.tensor}, {worst.call})"
        )
    for line in _failures(outcome)[:LISTED_AT_MOST]:
        click.echo(f"  {line}")
    click.echo(f"worst tensor: {outcome.worst}" if outcome.worst else "nothing was compared")
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo("PASSED" if outcome.passed else "FAILED")


def _failures(outcome: Comparison) -> list[str]:
    failed = [tensor for tensor in outcome.tensors if not tensor.passed]
    worst_first = sorted(failed, key=lambda tensor: tensor.severity, reverse=True)
    return outcome.problems + [str(tensor) for tensor in worst_first]


def _reason(report: Report, had_layers: bool) -> str:
    """Why it failed, and where to look."""
    outcome = report.outcome
    reasons = list(outcome.problems[:LISTED_AT_MOST])
    failures = [tensor for tensor in outcome.tensors if not tensor.passed]
    if failures:
        many = f"{len(failures)} of {len(outcome.tensors)} tensors differ"
        reasons.append(f"{many}; the worst: {outcome.worst}")
        hidden = [tensor.tensor for tensor in failures if tensor.tensor.endswith(".hidden")]
        if hidden:
            reasons.append(f"first after {hidden[0].removesuffix('.hidden')}")
        elif not (had_layers or report.by_part):
            reasons.append("--layers shows where it starts")
    return f"{report.target}: {'; '.join(reasons or ['nothing was compared'])}"
