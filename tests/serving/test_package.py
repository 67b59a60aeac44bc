"""The packager: a repository that Triton takes, refers to what it should, and joins up."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.command import twotower
from twotower_client import cli as root
from twotower_contract.atomic import partial_folder, put_in_place
from twotower_contract.engine_set import open_engine_set
from twotower_contract.errors import TwoTowerError
from twotower_contract.options import INPUTS
from twotower_engines.errors import ServingError
from twotower_engines.serving.package import package, read_templates, templates_folder
from twotower_engines.serving.repository import MODELS, check_configs, check_repository, read_config
from twotower_engines.serving.settings import Settings


@pytest.fixture
def configs():
    return read_templates(ROOT / "triton_repo")


def run_cli(capsys, *arguments: str) -> str:
    root.cli.main(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


def test_the_repository_is_complete_and_names_the_engines(packaged) -> None:
    assert sorted(one.name for one in packaged.repository.iterdir()) == sorted(MODELS)
    check_repository(packaged.repository, MODELS)
    for name in MODELS:
        assert (packaged.repository / name / "1").is_dir()
    for name in ("preprocessing", "twotower", "postprocessing"):
        parameters = read_config(packaged.repository / name / "config.pbtxt").parameters
        found = {key: value.string_value for key, value in parameters.items()}
        settings = Settings(packaged.engines, slots=2, threads=1, prefix_mib=4)
        assert Settings.of_parameters(found) == settings
        assert (packaged.repository / name / "1" / "model.py").is_file()


def test_the_verb_writes_the_same(packaged, tmp_path, capsys) -> None:
    out = run_cli(
        capsys, "package", str(packaged.engines.parent), str(tmp_path / "repository"),
        "--slots", "3", "--checkpoint", str(packaged.checkpoint), "--json",
    )  # fmt: skip
    values = json.loads(out)
    assert values["engine_set"] == str(packaged.engines)
    assert values["checkpoint"] == str(packaged.checkpoint)
    assert values["slots"] == "3"
    check_repository(tmp_path / "repository", MODELS)


def test_every_setting_comes_back_as_it_was_given(tmp_path) -> None:
    settings = Settings(tmp_path / "e", tmp_path / "c", 3, 4, 5, 6, 7.5)
    defaults = Settings(tmp_path / "e")
    for name in Settings.__slots__:
        if name != "engine_set":
            assert getattr(settings, name) != getattr(defaults, name)
    assert Settings.of_parameters(settings.parameters()) == settings
    for name in ("slots", "prefill_ms"):
        with pytest.raises(ServingError, match=f"`{name}` is 'many', not a"):
            Settings.of_parameters({**settings.parameters(), name: "many"})


def test_the_verb_says_where_a_chunk_is_longer_than_the_budget(packaged, tmp_path, capsys) -> None:
    words = ["package", str(packaged.engines), str(tmp_path / "repository")]
    root.cli.main(words, standalone_mode=False)
    assert "--prefill-ms" not in capsys.readouterr().err
    root.cli.main([*words, "--prefill-ms", "0"], standalone_mode=False)
    assert re.search(r"a chunk of a prompt has \d+ tokens", capsys.readouterr().err)
    parameters = read_config(tmp_path / "repository" / "twotower" / "config.pbtxt").parameters
    assert parameters["prefill_ms"].string_value == "0.0"


def test_writing_again_replaces_and_leaves_nothing_else(packaged, tmp_path) -> None:
    engines, repository = open_engine_set(packaged.engines), tmp_path / "repository"
    package(engines, repository, Settings(packaged.engines, slots=1))
    (repository / "twotower" / "left").write_text("over")
    package(engines, repository, Settings(packaged.engines, slots=2))
    assert not (repository / "twotower" / "left").exists()
    assert 'string_value: "2"' in (repository / "twotower" / "config.pbtxt").read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["repository"]


def test_a_folder_of_something_else_is_not_replaced(packaged, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ServingError, match=r"holds `thesis\.tex`"):
        package(open_engine_set(packaged.engines), tmp_path, Settings(packaged.engines))
    with pytest.raises(ServingError, match="is no folder"):
        package(
            open_engine_set(packaged.engines), tmp_path / "thesis.tex", Settings(packaged.engines)
        )
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_write_that_fails_leaves_the_old_one(packaged, tmp_path, monkeypatch) -> None:
    engines, repository = open_engine_set(packaged.engines), tmp_path / "repository"
    package(engines, repository, Settings(packaged.engines, slots=1))

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ServingError, match=r"cannot be written \(disk full\); name another place"):
        package(engines, repository, Settings(packaged.engines, slots=2))
    assert 'string_value: "1"' in (repository / "twotower" / "config.pbtxt").read_text()
    assert [one.name for one in tmp_path.iterdir()] == ["repository"]


def test_a_new_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "here").touch()
    with partial_folder(tmp_path) as work, pytest.raises(FileNotFoundError):
        put_in_place(work / "repository", tmp_path / "repository")
    assert [one.name for one in tmp_path.rglob("*")] == ["repository", "here"]


def test_a_place_that_cannot_be_written_is_named(packaged, tmp_path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "x" / "y", Path("/proc/zz")):
        ran = twotower("package", packaged.engines, place)
        assert ran.returncode == 2
        assert ran.stderr.startswith(f"error: {place}: cannot be written (")
        assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("slots", [0, 5])
def test_slots_that_the_engines_do_not_have(packaged, tmp_path, slots) -> None:
    settings = Settings(packaged.engines, slots=slots)
    with pytest.raises(ServingError, match=f"--slots is {slots}, but the engines have 1 to 4"):
        package(open_engine_set(packaged.engines), tmp_path / "repository", settings)


def test_engines_and_checkpoint_are_checked_first(packaged, tmp_path) -> None:
    changed = tmp_path / "cpu"
    shutil.copytree(packaged.engines, changed)
    (changed / "denoiser.onnx").write_bytes(b"nothing")
    with pytest.raises(TwoTowerError, match=r"denoiser\.onnx"):
        package(open_engine_set(changed), tmp_path / "repository", Settings(changed))
    settings = Settings(packaged.engines, checkpoint=tmp_path / "moved")
    with pytest.raises(TwoTowerError, match="moved"):
        package(open_engine_set(packaged.engines), tmp_path / "repository", settings)
    assert not (tmp_path / "repository").exists()


def test_the_configurations_join_up(configs) -> None:
    check_configs(configs)


@pytest.mark.parametrize("name", ["ensemble", "twotower", "preprocessing"])
def test_the_inputs_are_those_of_the_table(configs, name) -> None:
    from tritonclient.grpc.model_config_pb2 import DataType

    def wire(tensor):
        kind = DataType.Name(tensor.data_type).removeprefix("TYPE_")
        return "BYTES" if kind == "STRING" else kind

    inputs = {one.name: (wire(one), *one.dims, one.optional) for one in configs[name].input}
    own = {"request": ("BYTES", 1, True)} if name == "twotower" else {}
    assert inputs == {name: (*form, True) for name, form in INPUTS.items()} | own


def test_every_input_is_passed_on_to_preprocessing(configs) -> None:
    assert dict(step(configs, 0).input_map) == {name: name for name in INPUTS}


def rename(mapping, old: str, new: str) -> None:
    mapping[new] = mapping[old]
    del mapping[old]


def step(configs, number: int):
    return configs["ensemble"].ensemble_scheduling.step[number]


INT64, TEXT = 9, 13  # of Triton's DataType

# what is said: how the configurations are broken
BREAKS = {
    "there is none": lambda c: setattr(step(c, 0), "model_name", "gone"),
    "has no input `requst`": lambda c: rename(step(c, 1).input_map, "request", "requst"),
    "has no output `text`": lambda c: rename(step(c, 2).output_map, "text_output", "text"),
    "which nothing gives": lambda c: step(c, 1).input_map.update({"request": "reqest"}),
    "is TYPE_INT64": lambda c: setattr(c["twotower"].output[1], "data_type", INT64),
    "nothing feeds it": lambda c: c["postprocessing"].input.add(name="a", data_type=TEXT, dims=[1]),
    "is optional, but preprocessing needs": lambda c: setattr(
        c["preprocessing"].input[0], "optional", False
    ),
    "its name is `other`": lambda c: setattr(c["twotower"], "name", "other"),
    "the steps give nothing": lambda c: c["ensemble"].output.add(
        name="a", data_type=TEXT, dims=[1]
    ),
}


@pytest.mark.parametrize("said", list(BREAKS))
def test_an_ensemble_that_does_not_join_up_is_refused(configs, said) -> None:
    BREAKS[said](configs)
    with pytest.raises(ServingError) as refusal:
        check_configs(configs)
    assert said in str(refusal.value)


def test_a_configuration_that_triton_would_refuse(tmp_path) -> None:
    path = tmp_path / "config.pbtxt"
    for text in ('name: "a" colour: 3', 'name: "a" input [ { data_type: TYPE_INT99 } ]', "name: 3"):
        path.write_text(text)
        with pytest.raises(ServingError, match="no valid model configuration"):
            read_config(path)
    with pytest.raises(ServingError, match="cannot be read"):
        read_config(tmp_path / "none")


@pytest.mark.parametrize(
    ("values", "said"),
    [({}, "no parameter `engine_set`"), ({"engine_set": "a", "slots": "x"}, "`slots` is 'x'")],
)
def test_parameters_that_were_edited_badly(values, said) -> None:
    with pytest.raises(ServingError, match=said):
        Settings.of_parameters(values)


def test_templates_are_found_installed_and_in_a_checkout(tmp_path, monkeypatch) -> None:
    assert templates_folder() == ROOT / "triton_repo"
    installed = tmp_path / "triton_repo"
    shutil.copytree(ROOT / "triton_repo", installed)
    module = "twotower_engines.serving.package"
    monkeypatch.setattr(f"{module}.files", lambda package: tmp_path)
    assert templates_folder() == installed
    monkeypatch.setattr(f"{module}.files", lambda package: tmp_path / "none")
    monkeypatch.setattr(f"{module}.__file__", str(tmp_path / "a/b/c/d/e.py"))
    with pytest.raises(ServingError, match="install twotower again"):
        templates_folder()
