"""A Triton model repository: its config.pbtxt files, read and checked without a server.

Triton's own message classes check syntax, fields, enums and types. What they do not notice, and a
server only reports at start, is checked here: an ensemble's step that names a model or a tensor
that is not there, or joins two tensors of different types.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower_engines.errors import ServingError

CONFIG_FILE = "config.pbtxt"
MODEL_FILE = "model.py"
MODELS = ("preprocessing", "twotower", "postprocessing", "ensemble", "llm")

Config = Any  # tritonclient.grpc.model_config_pb2.ModelConfig, whose module has no types


def read_config(path: Path) -> Config:
    """Parse a config.pbtxt.

    Raises:
        ServingError: It cannot be read, or Triton's schema refuses it.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        text = path.read_text(encoding="utf-8")
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except OSError as problem:
        raise ServingError(f"{path}: cannot be read ({problem.strerror})") from problem
    except text_format.ParseError as problem:
        raise ServingError(
            f"{path}: is no valid model configuration: {problem}; correct it, or write the "
            "repository again with `twotower package ENGINES REPO`"
        ) from problem


def config_text(config: Config) -> str:
    """Return a configuration as config.pbtxt holds it."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config))


def check_repository(repository: Path, models: Sequence[str]) -> None:
    """Check that a folder is a model repository with these models.

    Raises:
        ServingError: It is not, or a configuration in it is wrong.
    """
    if not repository.is_dir():
        raise ServingError(
            f"{repository}: no such folder; write a model repository with "
            "`twotower package ENGINES REPO`"
        )
    missing = [name for name in models if not (repository / name / CONFIG_FILE).is_file()]
    if missing:
        raise ServingError(
            f"{repository}: is no model repository of ours, it holds no {missing[0]}/{CONFIG_FILE};"
            " write one with `twotower package ENGINES REPO`"
        )
    configs = {name: read_config(repository / name / CONFIG_FILE) for name in models}
    check_configs(configs)
    for name, config in configs.items():
        code = repository / name / "1" / (config.default_model_filename or MODEL_FILE)
        if config.backend == "python" and not os.access(code, os.R_OK):
            raise ServingError(
                f"{code}: is missing or cannot be read; write the repository again with "
                "`twotower package ENGINES REPO`"
            )


def check_configs(configs: Mapping[str, Config]) -> None:
    """Check configurations against each other.

    Args:
        configs: Folder name to configuration.

    Raises:
        ServingError: A name differs from its folder's, or an ensemble does not join up.
    """
    for folder, config in configs.items():
        if config.name != folder:
            raise ServingError(f"{folder}/{CONFIG_FILE}: its name is `{config.name}`")
        if config.platform == "ensemble":
            _check_ensemble(config, configs)


def _check_ensemble(ensemble: Config, configs: Mapping[str, Config]) -> None:
    """Follow the tensors through the steps, each known by its type and shape."""
    where = f"{ensemble.name}/{CONFIG_FILE}"
    known = {tensor.name: _kind(tensor) for tensor in ensemble.input}
    optional = {tensor.name for tensor in ensemble.input if tensor.optional}
    for step in ensemble.ensemble_scheduling.step:
        model = configs.get(step.model_name)
        if model is None:
            raise ServingError(
                f"{where}: a step names the model `{step.model_name}`: there is none"
            )
        inputs = {tensor.name: tensor for tensor in model.input}
        for name, source in step.input_map.items():
            _check_joint(f"{where}: {step.model_name}", "input", name, inputs, source, known)
            if source in optional and not inputs[name].optional:
                raise ServingError(
                    f"{where}: `{source}` is optional, but {step.model_name} needs `{name}`"
                )
        left_out = sorted(
            name for name in inputs if name not in step.input_map and not inputs[name].optional
        )
        if left_out:
            raise ServingError(
                f"{where}: {step.model_name} needs `{left_out[0]}`; nothing feeds it"
            )
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, target in step.output_map.items():
            if name not in outputs:
                raise ServingError(f"{where}: {step.model_name} has no output `{name}`")
            known[target] = _kind(outputs[name])
    for tensor in ensemble.output:
        if known.get(tensor.name) != _kind(tensor):
            raise ServingError(
                f"{where}: output `{tensor.name}` is {_words(_kind(tensor))}, but the steps give "
                f"{_words(known.get(tensor.name))}"
            )


def _check_joint(
    where: str,
    what: str,
    name: str,
    tensors: Mapping[str, Any],
    source: str,
    known: Mapping[str, tuple[int, tuple[int, ...]]],
) -> None:
    if name not in tensors:
        raise ServingError(f"{where} has no {what} `{name}`")
    if source not in known:
        raise ServingError(f"{where}: {what} `{name}` comes from `{source}`, which nothing gives")
    if known[source] != _kind(tensors[name]):
        raise ServingError(
            f"{where}: {what} `{name}` is {_words(_kind(tensors[name]))}, but `{source}` is "
            f"{_words(known[source])}"
        )


def _kind(tensor: Any) -> tuple[int, tuple[int, ...]]:
    return tensor.data_type, tuple(tensor.dims)


def _words(kind: tuple[int, tuple[int, ...]] | None) -> str:
    from tritonclient.grpc import model_config_pb2

    if kind is None:
        return "nothing"
    return f"{model_config_pb2.DataType.Name(kind[0])} {list(kind[1])}"
