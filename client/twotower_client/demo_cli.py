"""The verb `twotower demo`: the whole path on this machine, each step a command that is shown.

The other verbs run as processes, as a user would run them; only the last step, asking the server,
is this package's own.
"""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from twotower_client.errors import ClientError
from twotower_client.generate_cli import replay_blocks
from twotower_contract.command_line import html_option
from twotower_contract.processes import run_child
from twotower_contract.replay import Replay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from twotower_client.result import Answer

MARK = ".twotower-demo"
MAX_NEW_TOKENS = 2048  # with as long a prompt, what the engines hold: 4096 tokens
MAX_PROMPT_BYTES = 2048  # no token is shorter than a byte
# Packages that the steps need and the client does not. A server on PATH replaces pytriton.
NEEDED = ("ml_dtypes", "onnx", "onnx_ir", "onnxruntime", "tokenizers")
BLOCK_END = "|"
PROMPT = "Mia the fox lived by the river. Mia had a red kite and loved it more than anything."
EPILOG = """\b
Examples:
  twotower demo
  twotower demo --folder /tmp/demo --max-new-tokens 32
  twotower demo --precision fp8
  twotower demo --html replay.html
  twotower demo --prompt "Tom the bear lived on a farm. Tom had a green ball"
"""


class DemoRefusedError(ClientError):
    """The demo cannot be given on this machine, in this folder or with this prompt."""


class StepFailedError(ClientError):
    """A step of the demo failed; its own message stands above."""

    exit_code = 1


@click.command(epilog=EPILOG)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    help="Folder for the artifacts; it is made anew each time.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp8", "nvfp4", "int4"]),
    default="bf16",
    help="Precision of the weights; all but bf16 add a step that quantizes them.",
)
@click.option(
    "--prompt",
    default=PROMPT,
    show_default=False,
    help="Text to continue.  [default: the opening of a story]",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1, MAX_NEW_TOKENS),
    default=128,
    help="Length of the answer in tokens.",
)
@html_option
def demo(folder: Path, precision: str, prompt: str, max_new_tokens: int, html: Path | None) -> None:
    """Export, build, package and serve the small checkpoint, and stream an answer from it."""
    _check_prompt(prompt)
    _check_installed()
    _make_folder(folder)
    paths = {name: str(folder / name) for name in ("checkpoint", "bundle", "engines", "repository")}
    checkpoint, bundle, engines, repository = paths.values()
    steps: list[tuple[str, ...]] = [("tiny", checkpoint, "--pretrained")]
    if precision != "bf16":
        wide = str(folder / "bf16")
        steps = [
            ("tiny", wide, "--pretrained"),
            ("quantize", wide, checkpoint, "--format", precision),
        ]
    steps += [
        ("export", checkpoint, bundle),
        ("build", bundle, "--sku", "cpu", engines),
        ("package", engines, repository),
    ]
    total = len(steps) + 2
    for number, step in enumerate(steps, 1):
        _say(number, total, *step)
        if run_child(_command(*step)).returncode:
            raise StepFailedError(f"`twotower {step[0]}` failed; its messages stand above")
    port = _free_port()
    serve = ("serve", repository, "--grpc-port", str(port), "--no-metrics")
    _say(total - 1, total, *serve)
    with _server(serve):
        url = f"127.0.0.1:{port}"
        page = () if html is None else ("--html", str(html))
        options = ("--url", url, "--stream", "--max-new-tokens", str(max_new_tokens), *page)
        ends = ("--",) if prompt.startswith("-") else ()
        _say(total, total, "generate", *options, *ends, prompt)
        _ask(url, prompt, max_new_tokens, html)
    click.echo(f"\nThe artifacts are in {folder.resolve()}:")
    for name, path in paths.items():
        click.echo(f"  {name:<11} {_size(Path(path)):>8}  {path}")


def _check_prompt(prompt: str) -> None:
    """Refuse a prompt that otherwise only the last step would refuse.

    Raises:
        DemoRefusedError: It is empty, too long or not Unicode.
    """
    if not prompt:
        raise DemoRefusedError("--prompt is empty; give some text, or leave it out")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as problem:
        raise DemoRefusedError(
            f"--prompt is not valid UTF-8 at character {problem.start}; give it as UTF-8"
        ) from problem
    if size > MAX_PROMPT_BYTES:
        raise DemoRefusedError(
            f"--prompt has {size} bytes; the demo takes {MAX_PROMPT_BYTES} at most: shorten it"
        )


def _check_installed() -> None:
    """Look for the packages of every step, without importing them.

    Raises:
        DemoRefusedError: Naming those that are missing, and how to get them.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if shutil.which("tritonserver") is None and importlib.util.find_spec("pytriton") is None:
        missing.append("pytriton")
    if missing:
        raise DemoRefusedError(
            f"the demo needs packages that are not installed: {', '.join(missing)}; install them "
            "with: pip install 'twotower[export,serve]'"
        )


def _make_folder(folder: Path) -> None:
    """Make an empty folder, or empty one of an earlier demo.

    Raises:
        DemoRefusedError: The folder holds something else, or cannot be written.
    """
    try:
        if (folder / MARK).is_file():
            shutil.rmtree(folder)
        if folder.is_dir() and any(folder.iterdir()):
            raise DemoRefusedError(
                f"{folder}: is not empty and no earlier demo's; choose another with --folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()
    except OSError as problem:
        raise DemoRefusedError(
            f"{folder}: cannot be written ({problem.strerror}); choose another with --folder"
        ) from problem


def _free_port() -> int:
    """Return a free port. Naming it lets the commands that are shown be given again as they are."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    return port


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "twotower_client.cli", *arguments]


def _say(number: int, total: int, *arguments: str) -> None:
    click.secho(f"\n[{number}/{total}] twotower {shlex.join(arguments)}", bold=True)


@contextmanager
def _server(serve: tuple[str, ...]) -> Iterator[None]:
    """Run `twotower serve` until the end of the `with` block, which begins when it is ready."""
    process = subprocess.Popen(_command(*serve), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise StepFailedError(
                "`twotower serve` ended before it was ready; its messages stand above"
            )
        click.echo(line, nl=False)
        yield
    finally:
        process.terminate()
        process.wait()


def _ask(url: str, prompt: str, max_new_tokens: int, html: Path | None) -> None:
    """Stream an answer: the text as it grows, a mark after each block, figures at the end."""
    from twotower_client.client import TwoTowerClient

    click.echo(f"(each {BLOCK_END} ends a block)\n{prompt}", nl=False)
    with TwoTowerClient(url) as client:
        told = html is not None
        stream = client.stream(prompt, max_new_tokens=max_new_tokens, logprobs=told)
        for number, block in enumerate(stream):
            click.secho(block.text, nl=False, fg=("cyan", "green")[number % 2])
            click.secho(BLOCK_END, nl=False, dim=True)
        answer = stream.answer()
    figures = _figures(answer)
    click.echo(f"\n\n{figures}")
    if html is not None:
        Replay(prompt, replay_blocks(answer), figures.partition("\n")[0]).write(html)


def _figures(answer: Answer) -> str:
    count = len(answer.ids)
    calls = ", ".join(str(len(block.masked_counts)) for block in answer.blocks)
    return (
        f"{count} tokens in {answer.seconds:.2f} s: {count / answer.seconds:.0f} tokens/s, "
        f"{count / answer.denoiser_calls:.1f} tokens per denoiser call, "
        f"finished by {answer.finish_reason}\n"
        f"denoiser calls per block: {calls}"
    )


def _size(folder: Path) -> str:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.1f} MB"
