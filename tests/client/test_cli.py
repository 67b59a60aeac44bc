"""The root command line: lazy, honest about what is missing, no tracebacks for user errors."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import click
import pytest

from tests.support import ROOT
from tests.support.command import twotower
from twotower_client import cli as root
from twotower_client.errors import RequestRefusedError

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "transformers", "triton", "tokenizers")


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_first_client_loads_what_takes_long_and_not_the_package() -> None:
    ran = run_python(
        "import sys, twotower_client as client\n"
        "all_of_it = [getattr(client, name) for name in client.__all__]\n"
        "slow = {'grpc', 'numpy', 'tritonclient', 'google', 'click'}\n"
        "print(slow & set(sys.modules))\n"
        "client.TwoTowerClient('localhost:1')\n"
        "print(slow - set(sys.modules))"
    )
    assert ran.stdout.splitlines() == ["set()", "{'click'}"], ran.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import twotower_client",
        "from twotower_client import TwoTowerClient",
        "import twotower_client.generate_cli",
        "import twotower_client.cli as c; c.cli.main(['--help'], standalone_mode=False)",
    ],
)
def test_client_loads_nothing_heavy(code: str) -> None:
    ran = run_python(f"{code}\nimport sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"


def test_help_lists_every_verb_and_shows_examples_without_importing_them() -> None:
    ran = run_python(
        "import sys, twotower_client.cli as c\n"
        "c.cli.main(['--help'], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.startswith(('twotower_e', 'tritonclient'))])"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
    for verb in root.VERBS:
        assert f"\n  {verb}  " in ran.stdout, verb
    assert 'twotower generate "Mia the fox lived by the river." --url localhost' in ran.stdout
    assert "twotower tiny checkpoint --pretrained\n" in ran.stdout


def test_version() -> None:
    ran = twotower("--version")
    assert ran.stdout.startswith("twotower 0.")


def test_unknown_verb_names_the_known_ones() -> None:
    ran = twotower("genrate")
    assert ran.returncode == 2
    assert "genrate" in ran.stderr
    assert "generate" in ran.stderr


@pytest.mark.parametrize("name", list(root.VERBS))
def test_every_verb_has_a_command_with_examples(name: str) -> None:
    command = root.cli.get_command(click.Context(root.cli), name)
    assert command is not None
    assert command.name == name
    page = command.get_help(click.Context(command, info_name=name))
    assert f"twotower {name}" in page, f"`twotower {name} --help` shows no example"


BLOCKED = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, p=None: None if n.split('.')[0] in {modules!r} else find(n, p)
import types, click
fake = types.ModuleType("fake_verb")
def body():
    {body}
fake.build = click.command("build")(body)
sys.modules["fake_verb"] = fake
import twotower_client.cli as c
c.VERBS["build"] = c.Verb("fake_verb", "", "build")
sys.argv = ["twotower", "build"]
c.main()
"""


def run_verb(body: str, missing: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Call a verb made for the test, in a process where some packages are not installed."""
    return run_python(BLOCKED.format(body=body, modules=set(missing) or {""}))


@pytest.mark.parametrize(
    ("module", "extra"), [("onnxruntime", "build"), ("torch", "reference"), ("onnx", "build")]
)
def test_missing_package_names_the_extra(module: str, extra: str) -> None:
    ran = run_verb(f"import {module}", (module,))
    assert ran.returncode == 2
    assert f"pip install 'twotower[{extra}]'" in ran.stderr
    assert module in ran.stderr
    assert "Traceback" not in ran.stderr


def test_missing_module_of_ours_is_a_bug() -> None:
    ran = run_verb("import twotower_engines.no_such_module")
    assert ran.returncode == 1
    assert "Traceback" in ran.stderr


def test_missing_submodule_of_an_installed_package_is_a_bug() -> None:
    ran = run_verb("import onnx.no_such_module")
    assert "Traceback" in ran.stderr
    assert "pip install" not in ran.stderr


def test_user_error_is_one_line_and_bug_is_a_traceback() -> None:
    user = run_verb("from twotower_contract.errors import EngineSetError as E; raise E('no, why')")
    assert (user.returncode, user.stderr) == (2, "error: no, why\n")
    bug = run_verb("raise ValueError('oops')")
    assert bug.returncode == 1
    assert "Traceback" in bug.stderr


def test_a_file_that_the_system_refuses_is_one_line() -> None:
    ran = run_verb("open('/no/such/file')")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: /no/such/file: No such file or directory; name another")
    assert ran.stderr.count("\n") == 1
    nameless = run_verb("raise OSError('oops')")
    assert nameless.returncode == 1
    assert "Traceback" in nameless.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--url", "localhost:1", "--save"],
        ["bench", "--url", "localhost:1", "--html"],
        ["generate", "Mia", "--url", "localhost:1", "--html"],
        ["generate", "--input", __file__, "--output"],
        ["demo", "--html"],
        ["run", "no-engines", "--prompt", "Mia", "--html"],
        ["selftest", "no-engines", "--record"],
    ],
    ids=" ".join,
)
def test_an_output_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, arguments):
    file = tmp_path / "no-folder" / "result"
    with pytest.raises(FileNotFoundError) as refused:
        root.cli.main([*arguments, str(file)], standalone_mode=False)
    assert refused.value.filename == str(file)


def test_answers_are_not_kept_in_a_device(tmp_path) -> None:
    (tmp_path / "prompts").write_text("Mia")
    files = ["--input", str(tmp_path / "prompts"), "--output", "/dev/null"]
    with pytest.raises(RequestRefusedError, match="is no ordinary file"):
        root.cli.main(["generate", *files], standalone_mode=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny", "/proc/zz", "--pretrained"],
        ["tiny", "/proc/zz", "--random", "--pattern", "M", "--hidden", "8"],
        ["build", "{bundle}", "{file}", "--sku", "cpu"],
        ["export", "{checkpoint}", "/proc/zz"],
        ["run", "{checkpoint}", "--prompt-ids", "5"],
    ],
    ids=" ".join,
)
def test_places_that_cannot_be_written_are_named(path_folders, tmp_path, arguments) -> None:
    places = {name: str(path_folders / name) for name in ("checkpoint", "bundle")}
    places["file"] = str(tmp_path / "file")
    (tmp_path / "file").touch()
    ran = twotower(*(one.format(**places) for one in arguments), XDG_CACHE_HOME="/proc/zz")
    assert ran.returncode == 2, ran.stderr
    said = ran.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert "/proc/" in said or places["file"] in said


def test_an_answer_is_printed_where_the_terminal_has_not_its_letters() -> None:
    code = BLOCKED.format(body=r"print('\u0141\xf3d\u017a')", modules={""})
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, **locale}
    )
    assert ran.stdout == rb"\u0141\xf3d\u017a" + b"\n", ran.stderr


def test_every_third_party_import_is_in_the_table() -> None:
    """A module that is missing from the table would be reported as a bug instead of an extra."""
    ours = {"twotower_contract", "twotower_export", "twotower_engines", "twotower_client"}
    base = {"numpy", "click", "tritonclient", "google", "grpc", "triton_python_backend_utils"}
    seen = {}
    for folder in ("export", "engines", "client"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                seen.update({name.partition(".")[0]: path for name in names})
    unknown = set(seen) - sys.stdlib_module_names - ours - base - set(root.EXTRAS_OF_MODULE)
    assert not unknown, {name: str(seen[name]) for name in unknown}
