"""The `twotower` command: one verb for each thing the project does.

Each verb lives in the package that does the work and is imported only when it is called, so that
`twotower generate` works where nothing but the client is installed. A verb whose packages are
missing says which extra brings them.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from dataclasses import dataclass

import click

from twotower_client.streams import add_options, flush_output, open_closed, say_last
from twotower_contract.atomic import given_path, remedy
from twotower_contract.logfile import is_verbose
from twotower_contract.processes import INTERRUPTED, interruptible


@dataclass(frozen=True)
class Verb:
    """A verb: the module of its command, its line in the list, and the extra that it needs.

    The command has the verb's name in its module.
    """

    module: str
    summary: str
    extra: str | None = None


# In the order in which a newcomer meets them.
VERBS: dict[str, Verb] = {
    "demo": Verb(
        "twotower_client.demo_cli", "Walk the whole path below with a small checkpoint.", "serve"
    ),
    "tiny": Verb(
        "twotower_export.cli.tiny", "Write a small checkpoint in the released layout.", "reference"
    ),
    "inspect": Verb(
        "twotower_export.cli.export",
        "Show the contents of a checkpoint, bundle or engine set.",
        "export",
    ),
    "quantize": Verb(
        "twotower_export.cli.quantize",
        "Write a checkpoint with FP8, NVFP4 or INT4 weights.",
        "export",
    ),
    "export": Verb(
        "twotower_export.cli.export", "Write a checkpoint's graphs as a bundle.", "export"
    ),
    "golden": Verb(
        "twotower_export.cli.golden",
        "Compute the answer that engines must give in the self-test.",
        "reference",
    ),
    "plan": Verb(
        "twotower_engines.cli.plan", "Estimate which GPUs a model fits on, and its speed."
    ),
    "simulate": Verb(
        "twotower_engines.cli.simulate", "Simulate a server of some GPU under some load."
    ),
    "build": Verb(
        "twotower_engines.cli.build", "Build a bundle's engines for one or more SKUs.", "build"
    ),
    "verify": Verb(
        "twotower_export.cli.verify",
        "Compare engines with a reference, output by output.",
        "reference",
    ),
    "run": Verb("twotower_engines.cli.run", "Generate on this machine, without a server.", "build"),
    "selftest": Verb(
        "twotower_engines.cli.self_test",
        "Check engines with a prompt whose answer is known.",
        "build",
    ),
    "package": Verb(
        "twotower_engines.cli.serve", "Write a Triton model repository for an engine set.", "serve"
    ),
    "serve": Verb(
        "twotower_engines.cli.serve", "Run a Triton server on a model repository.", "serve"
    ),
    "probe": Verb("twotower_client.probe_cli", "Ask a server whether it is live or ready."),
    "generate": Verb("twotower_client.generate_cli", "Ask a running server for an answer."),
    "openai": Verb(
        "twotower_client.openai_cli", "Serve OpenAI's HTTP interface for a server.", "openai"
    ),
    "bench": Verb("twotower_client.bench_cli", "Measure a server under load, or engines alone."),
    "doctor": Verb(
        "twotower_engines.cli.doctor", "Report what works on this machine and what is missing."
    ),
    "cache": Verb("twotower_engines.cli.cache", "List or delete cached engines and timings."),
    "kernels": Verb(
        "twotower_engines.cli.kernels", "Compile our GPU kernels and list what they use.", "kernels"
    ),
}

# Which extras bring a third-party module. A module that is not here is a bug when it is missing.
EXTRAS_OF_MODULE: dict[str, tuple[str, ...]] = {
    "cuda": ("tensorrt", "rtx"),
    "huggingface_hub": ("export",),
    "jinja2": ("openai",),
    "ml_dtypes": ("export", "build"),
    "onnx": ("export", "build"),
    "onnx_ir": ("export",),
    "onnxruntime": ("build",),
    "polygraphy": ("build",),
    "pytriton": ("serve",),
    "safetensors": ("reference",),
    "starlette": ("openai",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("rtx",),
    "tokenizers": ("export", "reference", "build"),
    "torch": ("reference",),
    "tqdm": ("export",),
    "transformers": ("dev",),
    "triton": ("kernels",),
    "uvicorn": ("openai",),
}

OF_LINUX = ("fcntl", "resource")
OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""Refusals that name no file where an open one is written, or none can be opened."""

EPILOG = """
Examples, from a checkpoint to an answer:

\b
  twotower tiny checkpoint --pretrained
  twotower export checkpoint bundle
  twotower build bundle --sku cpu engines
  twotower run engines --prompt "Mia the fox lived by the river."
  twotower package engines repository
  twotower serve repository --grpc-port 8001
  twotower generate "Mia the fox lived by the river." --url localhost:8001 --stream

`twotower VERB --help` shows a verb's options and more examples.
"""


class LazyGroup(click.Group):
    """A group that knows its verbs by name and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a verb's module and return its command, or None for an unknown verb."""
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        command = getattr(importlib.import_module(verb.module), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{verb.module}:{cmd_name} is no click command")
        return add_options(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs from the table alone: importing them would make help slow."""
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.summary) for name, verb in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb, or say which verbs there are."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            known = ", ".join(VERBS)
            raise click.UsageError(f"there is no verb {args[0]!r}; the verbs are {known}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(importlib.metadata.version("twotower"), message="twotower %(version)s")
def cli() -> None:
    """Export, build and serve NVIDIA Nemotron-Labs-TwoTower.

    Each verb turns one folder into the next: checkpoint, bundle, engines, model repository.
    """


def missing_extra(problem: ModuleNotFoundError, verb: str | None) -> str | None:
    """Return advice for a user whose installation lacks a module, or None if it is our bug.

    Args:
        problem: Error of the failed import.
        verb: Name of the verb that was called, if it got that far.
    """
    module = (problem.name or "").partition(".")[0]
    if module in OF_LINUX:
        return f"`twotower {verb}` runs on Linux only: this system's Python has no module {module}"
    extras = EXTRAS_OF_MODULE.get(module)
    # A package that is there but lacks a submodule is another version than we were written for,
    # or a mistake of ours: its traceback says more than advice to install what is installed.
    if extras is None or importlib.util.find_spec(module) is not None:
        return None
    wanted = VERBS[verb].extra if verb in VERBS else None
    extra = wanted if wanted in extras else extras[0]
    what = f"`twotower {verb}`" if verb else "this"
    return f"{what} needs the package {module}; install it with: pip install 'twotower[{extra}]'"


def refused_file(problem: OSError) -> str | None:
    """Return what to tell a user whose file or folder the system refused; None if it is our bug.

    Where the system names two files, the second is the one that was to be written.
    """
    name = problem.filename2 or problem.filename
    if problem.errno == errno.ENOENT and name is None:  # of `tempfile`
        return f"{problem.strerror}; set TMPDIR to a folder that can be written"
    if name is None and problem.errno in OF_THE_SYSTEM:
        return f"{problem.strerror}, while a file or the output was written or opened"
    if name is None:
        return None
    path = given_path(name) if not isinstance(name, int) else "a file"
    return f"{path}: {problem.strerror}; {remedy(problem)}"


def main() -> None:
    """Run the command line; the console script `twotower`.

    Errors that a user can repair carry an `exit_code`, or are the system's refusal: they are
    printed without a traceback. Everything else is a bug and keeps its traceback.
    """
    open_closed()
    interruptible()
    try:
        code = _run()
        unwritten = flush_output()
        if unwritten is not None:
            say_last(f"error: standard output cannot be written: {unwritten}")
            code = code or 2
    except KeyboardInterrupt:
        say_last("interrupted")
        code = INTERRUPTED
    sys.exit(code)


def _run() -> int:
    """Run the verb, and return the exit code."""
    try:
        ended = cli.main(prog_name="twotower", standalone_mode=False)
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except click.Abort:  # how click passes on an interruption
        raise KeyboardInterrupt from None
    except Exception as problem:
        code = getattr(problem, "exit_code", None)
        message: str | None = str(problem)
        if isinstance(problem, ModuleNotFoundError):
            message, code = missing_extra(problem, _verb(sys.argv[1:])), 2
        elif isinstance(problem, OSError):
            message, code = refused_file(problem), 2
        if message is None or not isinstance(code, int):
            raise
        if code == 0:  # a dry run
            print(message)
            return 0
        if is_verbose():
            traceback.print_exc()
        say_last(f"error: {message}")
        return code
    return ended if isinstance(ended, int) else 0


def _verb(arguments: list[str]) -> str | None:
    """Return the verb among the arguments: the group has no option that takes a value."""
    return next((one for one in arguments if not one.startswith("-")), None)


if __name__ == "__main__":
    main()
