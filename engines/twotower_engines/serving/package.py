"""Writing a model repository for an engine set.

The models' configurations lie in `triton_repo/`. Packaging parses them, adds the inputs that the
table of options declares, sets the parameters that name this machine's engine set and checkpoint,
checks the whole, and writes it.
Engines and weights are not copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from twotower_contract.atomic import WITH_CARE, Writing, partial_folder, put_in_place
from twotower_contract.engine_set import EngineSet
from twotower_contract.options import INPUTS
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.errors import ServingError
from twotower_engines.serving.repository import (
    CONFIG_FILE,
    MODELS,
    check_configs,
    config_text,
    read_config,
)
from twotower_engines.serving.settings import Settings

# The ensemble has no code of its own: the steps read the parameters.
MODELS_WITH_CODE = tuple(name for name in MODELS if name != "ensemble")


def templates_folder() -> Path:
    """Return the folder `triton_repo`: inside the installed package, or beside it in a checkout.

    Raises:
        ServingError: Neither is there.
    """
    installed = Path(str(files("twotower_engines"))) / "triton_repo"
    checkout = Path(__file__).resolve().parents[3] / "triton_repo"
    for folder in (installed, checkout):
        if all((folder / name / CONFIG_FILE).is_file() for name in MODELS):
            return folder
    raise ServingError(
        f"the models' configurations are missing (looked in {installed} and {checkout}); "
        "install twotower again"
    )


def read_templates(folder: Path) -> dict[str, Any]:
    """Read the configurations of a folder `triton_repo`, and give them the inputs of a request."""
    from tritonclient.grpc import model_config_pb2

    configs = {name: read_config(folder / name / CONFIG_FILE) for name in MODELS}
    for model in ("preprocessing", "twotower", "ensemble"):
        for name, (wire, length) in INPUTS.items():
            kind = "TYPE_STRING" if wire == "BYTES" else f"TYPE_{wire}"
            data_type = model_config_pb2.DataType.Value(kind)
            configs[model].input.add(name=name, data_type=data_type, dims=[length], optional=True)
    request = configs["preprocessing"].output[0]
    configs["twotower"].input.add(
        name=request.name, data_type=request.data_type, dims=request.dims, optional=True
    )
    for name in INPUTS:
        configs["ensemble"].ensemble_scheduling.step[0].input_map[name] = name
    return configs


def package(
    engines: EngineSet, repository: Path, settings: Settings, writing: Writing = WITH_CARE
) -> None:
    """Write the model repository.

    Args:
        engines: The engine set, whose files and checkpoint are checked first.
        repository: Folder to write; an older repository of ours there is replaced.
        settings: The models' settings.
        writing: Whether to replace whatever is there, or to write nothing.

    Raises:
        TwoTowerError: The engines or their checkpoint are missing or changed, the slots are more
            than the engines have, something else lies at `repository`, or it cannot be written.
    """
    engines.check_engine_files()
    WeightStore(engines.manifest, settings.checkpoint).check()
    _check_slots(engines, settings)
    _check_replaceable(repository, writing)
    templates = templates_folder()
    configs = read_templates(templates)
    for name in MODELS_WITH_CODE:
        for key, value in settings.parameters().items():
            configs[name].parameters[key].string_value = value
    check_configs(configs)
    writing.begin(repository, "a model repository")
    try:
        with partial_folder(repository.parent) as work:
            made = work / repository.name
            _write(made, configs, templates)
            put_in_place(made, repository)
    except OSError as problem:
        raise ServingError(
            f"{repository}: cannot be written ({problem.strerror or problem}); name another place "
            "for the repository"
        ) from problem


def _write(folder: Path, configs: Mapping[str, Any], templates: Path) -> None:
    """Write the configurations, and the code of the models that have any."""
    for name, config in configs.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
    for name in MODELS_WITH_CODE:
        shutil.copyfile(templates / name / "1/model.py", folder / name / "1/model.py")


def _check_slots(engines: EngineSet, settings: Settings) -> None:
    limit = engines.build.limits.slots
    if settings.slots is not None and not 1 <= settings.slots <= limit:
        raise ServingError(
            f"--slots is {settings.slots}, but the engines have 1 to {limit}; build them again "
            "with more (`twotower build --slots`), or ask for fewer"
        )


def _check_replaceable(repository: Path, writing: Writing) -> None:
    """Refuse to write over anything but an empty folder or an older repository of ours."""
    if not repository.exists() and not repository.is_symlink():
        return
    if not repository.is_dir() or repository.is_symlink():
        raise ServingError(f"{repository}: is no folder; name another place for the repository")
    if repository.is_mount():
        raise ServingError(
            f"{repository}: is a mount point, which cannot be replaced; name a folder inside it"
        )
    if writing.force:
        return
    strange = sorted(one.name for one in repository.iterdir() if one.name not in MODELS)
    if strange:
        raise ServingError(
            f"{repository}: holds `{strange[0]}`, which no repository of ours has, so it is not "
            "replaced; name another place, move that away, or replace it with --force"
        )
