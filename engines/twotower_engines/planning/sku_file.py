"""GPUs that a user describes in a file, beside those of the table.

```toml
name = "rtx-6000-ada"
compute_capability = "8.9"
memory_gib = 47.4            # as CUDA sees it (cudaMemGetInfo), not as the box says
bandwidth_gb_s = 960         # of the datasheet, in 10^9 bytes per second
bf16_tflops = 182.1          # dense
# optional
title = "NVIDIA RTX 6000 Ada"
arch = "x86_64"              # CPU architecture of its machines, or "aarch64"; x86_64 where absent
device_names = ["RTX 6000 Ada Generation"]  # what nvidia-smi calls it, without "NVIDIA"
achieved_bandwidth = 0.9     # share of the bandwidth that kernels reach; 0.85 where absent
reserved_gib = 0             # what this memory holds besides, on unified memory
peer_gb_s = 25               # to a second GPU of the machine; absent: two GPUs cannot be used
precisions = ["bf16", "fp8"] # from the compute capability where absent
flavours = ["tensorrt-rtx"]  # the first is what `auto` takes; from the capability where absent
```
The same keys in JSON do as well.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twotower_contract.json_file import read_json
from twotower_contract.skus import Sku, known_skus, sku_of_values
from twotower_engines.errors import PlanError
from twotower_engines.planning.precisions import PRECISIONS

FLAVOURS = ("tensorrt", "tensorrt-rtx", "onnxruntime")
ARCHES = ("x86_64", "aarch64")
"""CPU architectures as `platform.machine()` names them on Linux."""

REQUIRED_KEYS = ("name", "compute_capability", "memory_gib", "bandwidth_gb_s", "bf16_tflops")
OPTIONAL_KEYS = (
    "title",
    "arch",
    "device_names",
    "achieved_bandwidth",
    "reserved_gib",
    "peer_gb_s",
    "precisions",
    "flavours",
)


def precisions_of(capability: str) -> tuple[str, ...]:
    """Return the precisions of a compute capability, by what TensorRT and our kernels serve."""
    number = tuple(int(part) for part in capability.split("."))
    found = ["bf16"]
    if number >= (8, 9):
        found.append("fp8")
    if number >= (8, 0):
        found += ["nvfp4", "int4"]
    return tuple(found)


def sku_of_file(path: Path) -> Sku:
    """Return the SKU that a user's file describes.

    Raises:
        PlanError: The file is unreadable or malformed; the message names key, value and remedy.
    """
    if path.suffix == ".toml":
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise PlanError(f"{path}: cannot be read: {problem.strerror}") from problem
        except ValueError as problem:
            raise PlanError(f"{path}: is not TOML: {problem}; correct it") from problem
    else:
        values = read_json(path, PlanError, "correct it").values
    _check_file(path, values)
    capability = values["compute_capability"]
    is_rtx = capability in ("8.6", "8.9", "12.0")
    values.setdefault("flavours", ["tensorrt-rtx", "tensorrt"] if is_rtx else ["tensorrt"])
    values.setdefault("precisions", list(precisions_of(capability)))
    values.setdefault("arch", ARCHES[0])
    return replace(sku_of_values(values), sources=dict.fromkeys(values, str(path)))


def _check_file(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a missing, unknown or impossible key, by name."""
    for key in REQUIRED_KEYS:
        if key not in values:
            raise PlanError(f"{path}: `{key}` is missing; required are {', '.join(REQUIRED_KEYS)}")
    for key, value in values.items():
        if key not in REQUIRED_KEYS + OPTIONAL_KEYS:
            close = difflib.get_close_matches(key, REQUIRED_KEYS + OPTIONAL_KEYS, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(OPTIONAL_KEYS)}"
            raise PlanError(f"{path}: unknown key `{key}`; {hint}")
        _check_value(path, key, value)
    if values["name"] in known_skus() or values["name"] in ("local", "all"):
        raise PlanError(f"{path}: `name` is {values['name']!r}, which is taken; choose another")


def _check_value(path: Path, key: str, value: Any) -> None:
    is_right: Any
    if key in ("precisions", "flavours"):
        allowed = tuple(PRECISIONS) if key == "precisions" else FLAVOURS
        is_right = isinstance(value, list) and value and all(one in allowed for one in value)
        wanted = f"a list of {', '.join(allowed)}"
    elif key == "name":
        is_right = isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", value)
        wanted = "small letters, digits, dots and dashes, as in rtx-6000-ada"
    elif key == "compute_capability":
        is_right = isinstance(value, str) and re.fullmatch(r"\d+\.\d", value)
        wanted = 'a text, as "8.9"'
    elif key == "title":
        is_right, wanted = isinstance(value, str), "a text"
    elif key == "arch":
        is_right, wanted = value in ARCHES, " or ".join(ARCHES)
    elif key == "device_names":
        is_right = isinstance(value, list) and all(isinstance(one, str) for one in value)
        wanted = "a list of texts"
    else:
        least = 0 if key == "reserved_gib" else 1e-9
        most = 1.0 if key == "achieved_bandwidth" else 1e9
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_right, wanted = is_number and least <= value <= most, "a positive number"
        if key == "achieved_bandwidth":
            wanted = "a share above 0 and at most 1"
    if not is_right:
        raise PlanError(f"{path}: `{key}` is {value!r:.80}, but {wanted} is wanted")
