"""The verb `twotower demo`: the whole path on this machine, each step a command that is shown.

The other verbs run as processes, as a user would run them; only the last step, asking the server,
is this package's own.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .errors import ClientError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["demo"]

MARK = ".twotower-demo"
PROMPT = "Mia the fox lived by the river. Mia had a red kite and loved it more than anything."
EPILOG = """\b
Examples:
  twotower demo
  twotower demo --folder /tmp/demo --max-new-tokens 32
  twotower demo --prompt "Tom the bear lived on a farm. Tom had a green ball"
"""


class DemoError(ClientError):
    """A step of the demo failed; its own message stands above."""

    exit_code = 1


@click.command(epilog=EPILOG)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where the artifacts go; made anew each time.",
)
@click.option("--prompt", default=PROMPT, help="What the answer continues.  [a story's opening]")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
def demo(folder: Path, prompt: str, max_new_tokens: int) -> None:
    """Export, build, package and serve the small checkpoint, and stream an answer from it."""
    _make_folder(folder)
    paths = {name: str(folder / name) for name in ("checkpoint", "bundle", "engines", "repository")}
    checkpoint, bundle, engines, repository = paths.values()
    steps = [
        ("tiny", checkpoint, "--pretrained"),
        ("export", checkpoint, bundle),
        ("build", bundle, "--sku", "cpu", engines),
        ("package", engines, repository),
    ]
    for number, step in enumerate(steps, 1):
        _say(number, *step)
        if _verb(*step).wait():
            raise DemoError(f"`twotower {step[0]}` failed; what it said stands above")
    _say(5, "serve", repository)
    with _server(repository) as url:
        manifest = json.loads((Path(bundle) / "manifest.json").read_text(encoding="utf-8"))
        eos_ids = manifest["eos_token_ids"]
        stops = [word for token in eos_ids for word in ("--eos-id", str(token))]
        _say(6, "generate", prompt, "--url", url, "--stream", *stops)
        _ask(url, prompt, max_new_tokens, eos_ids)
    click.echo(f"\nThe artifacts are in {folder.resolve()}:")
    for name, path in paths.items():
        click.echo(f"  {name:<11} {_size(Path(path)):>8}  {path}")


def _make_folder(folder: Path) -> None:
    """Make an empty folder, or empty one of an earlier demo.

    Raises:
        DemoError: The folder holds something else.
    """
    if (folder / MARK).is_file():
        shutil.rmtree(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise DemoError(
            f"{folder}: is not empty and no earlier demo's; choose another with --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _verb(*arguments: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "twotower_client.cli", *arguments]
    return subprocess.Popen(command, text=True, **options)  # type: ignore[call-overload,no-any-return]


def _say(number: int, *arguments: str) -> None:
    click.secho(f"\n[{number}/6] twotower {shlex.join(arguments)}", bold=True)


@contextmanager
def _server(repository: str) -> Iterator[str]:
    """Run `twotower serve` on free ports, and give the address of gRPC once it is ready."""
    ports = ("--grpc-port", "0", "--no-http", "--no-metrics")
    process = _verb("serve", repository, *ports, "--json", stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise DemoError("`twotower serve` ended before it was ready; what it said stands above")
        ready = json.loads(line)
        click.echo(f"ready after {ready['seconds']} s at {ready['grpc']}, process {ready['pid']}")
        yield ready["grpc"]
    finally:
        process.terminate()
        process.wait()


def _ask(url: str, prompt: str, max_new_tokens: int, eos_ids: list[int]) -> None:
    """Stream an answer: the text as it grows, a mark between blocks, figures at the end."""
    from .client import TwoTowerClient

    click.echo(prompt, nl=False)
    with TwoTowerClient(url) as client:
        started = time.monotonic()
        stream = client.stream(prompt, max_new_tokens=max_new_tokens, eos_ids=eos_ids)
        for number, block in enumerate(stream):
            # blocks are told apart by colour where there is colour
            click.secho(block.text, nl=False, fg=("cyan", "green")[number % 2])
        seconds = time.monotonic() - started
        answer = stream.answer()
    sizes = ", ".join(str(len(block.masked_counts)) for block in answer.blocks)
    click.echo(
        f"\n\n{len(answer.ids)} tokens in {seconds:.2f} s: {len(answer.ids) / seconds:.0f} tokens/s"
        f", {answer.tokens_per_denoiser_call:.1f} tokens per denoiser call, "
        f"finished by {answer.finish_reason}\n"
        f"denoiser calls per block of 16: {sizes}"
    )


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB"
