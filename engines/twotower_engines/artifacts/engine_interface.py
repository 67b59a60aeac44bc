"""The interface of a tower's engine as the manifest implies it: every input and output by name.

A graph that TensorRT parsed, or a plan, must have these and no others, or the runtime would bind
nothing, or the wrong thing, to an address.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field

from twotower_contract.config import ModelConfig
from twotower_contract.layout import FLAT, ROW_LISTS
from twotower_contract.manifest import Manifest, WeightInput

DYNAMIC = -1
"""A size that is not known before a call, as TensorRT writes it."""

STORED = {"BF16": "BF16", "F32": "FLOAT", "F8_E4M3": "FP8", "I32": "INT32"}
"""TensorRT's names of the dtypes that weights go in."""

COMPUTED = {"bfloat16": "BF16", "float32": "FLOAT"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype, as TensorRT names it, and shape of an input or output; `DYNAMIC` sizes are -1."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Interface:
    """Inputs and outputs of an engine by name."""

    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)


def is_flat(weight: WeightInput, inputs: Container[str]) -> bool:
    """Whether an engine with these inputs takes a bank of experts as one matrix; see `FLAT`."""
    return weight.name + FLAT in inputs


def interface_of(
    manifest: Manifest, tower: str, capacity: int = DYNAMIC, inputs: Container[str] = ()
) -> Interface:
    """Return the interface of a tower's engine in the checkpoint's dtype.

    A cache comes out as it went in, with the call's keys or values in its room: its input and its
    output are the same memory.

    Args:
        capacity: Tokens that a cache has room for; engines know it, graphs do not.
        inputs: The engine's own, which say how it takes banks of experts, and which lists of
            rows; a graph's where not given.
    """
    model, dtype = manifest.model, COMPUTED[manifest.model.dtype]
    states = dict(_states(model, dtype, capacity))
    queries = TensorSpec(dtype, (DYNAMIC, model.num_attention_heads, DYNAMIC, model.head_dim))
    attention = {f"context.layers.{i}.queries": queries for i in model.layers_of_kind["*"]}
    rows = {"ids": 2, "lengths": 1, "context_lengths": 1}
    if tower == "denoiser":
        rows |= dict.fromkeys(("conditioned", "steps_left", "policy", "seed"), 1)
    taken = {name: TensorSpec("INT32", (DYNAMIC,) * rank) for name, rank in rows.items()}
    if tower == "denoiser":
        taken |= dict.fromkeys(("threshold", "temperature"), TensorSpec("FLOAT", (DYNAMIC,)))
        lists = (name for name in ROW_LISTS if name in inputs)
        taken |= dict.fromkeys(lists, TensorSpec("INT32", (DYNAMIC,)))
    taken |= states
    for weight in manifest.weights[tower].values():
        if is_flat(weight, inputs):
            count, rows_, columns = weight.shape
            spec = TensorSpec(STORED[weight.input_dtype], (rows_, count * columns))
            taken[weight.name + FLAT] = spec
            continue
        forms = weight.forms(model.tensor_dtype)
        taken |= {name: TensorSpec(STORED[kind], shape) for name, (kind, shape) in forms.items()}
    new = {f"{name}_new": spec for name, spec in states.items()}
    if tower == "denoiser":
        caches = {name: spec for name, spec in new.items() if name.endswith("cache_new")}
        return Interface(taken, {**_refined(model), **caches, **attention})
    logits = TensorSpec("FLOAT", (DYNAMIC, model.vocab_size))
    return Interface(taken, {"logits": logits, **new, **attention})


def differences(found: Interface, expected: Interface) -> list[str]:
    """Return what is missing, unknown, or of another dtype or shape; a sentence for each."""
    problems = []
    for what, have, want in (
        ("input", found.inputs, expected.inputs),
        ("output", found.outputs, expected.outputs),
    ):
        problems += [f"{what} {name} is missing" for name in want if name not in have]
        for name, spec in have.items():
            if name not in want:
                problems.append(f"{what} {name} is not one of the model's")
            elif spec != want[name]:
                problems.append(f"{what} {name} is {spec}, not {want[name]}")
    return problems


def _states(model: ModelConfig, dtype: str, capacity: int) -> Iterator[tuple[str, TensorSpec]]:
    ssm = (model.mamba_num_heads, model.mamba_head_dim, model.ssm_state_size)
    for layer, kind in enumerate(model.pattern):
        name = f"context.layers.{layer}"
        if kind == "M":
            conv = (DYNAMIC, model.conv_kernel - 1, model.conv_dim)
            yield f"{name}.conv_state", TensorSpec(dtype, conv)
            yield f"{name}.ssm_state", TensorSpec("FLOAT", (DYNAMIC, *ssm))
        elif kind == "*":
            shape = (DYNAMIC, model.num_key_value_heads, capacity, model.head_dim)
            yield f"{name}.k_cache", TensorSpec(dtype, shape)
            yield f"{name}.v_cache", TensorSpec(dtype, shape)


def _refined(model: ModelConfig) -> dict[str, TensorSpec]:
    block = (DYNAMIC, DYNAMIC)
    return {
        "new_ids": TensorSpec("INT32", block),
        "confidence": TensorSpec("FLOAT", block),
        "committed": TensorSpec("INT32", block),
        "still_masked": TensorSpec("INT32", (DYNAMIC,)),
        "logits": TensorSpec(COMPUTED[model.dtype], (*block, model.vocab_size)),
    }
