"""One tower's engine and the CPU flavour's graph, given the same inputs: every output side by side.

Where `runtimes.py` sees what a runtime hands out, this sees all that an engine computes:
logits, new states, keys and values, confidences, ids and flags. The engine runs through the
interfaces of the resident runtime, the graph in ONNX Runtime. States are the reference's own, so
that one call's error does not grow in the next. Inputs that the engine takes as bf16 are rounded to
bf16 for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from twotower_contract.bfloat16 import from_bfloat16, to_bfloat16
from twotower_contract.engine_set import Limits
from twotower_contract.layout import ROW_LISTS
from twotower_contract.manifest import Manifest
from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.artifacts.engine_interface import Interface, TensorSpec, interface_of
from twotower_engines.runtime.resident.runtime import Tower
from twotower_engines.verify.differences import Array, Difference, compare_arrays

ROWS = 2
CHUNK, BLOCK, CONTEXT = 37, 16, 128
NUMPY = {"INT32": np.int32, "FLOAT": np.float32, "BF16": np.uint16}
TOKEN_AXES = {"queries": 2, "new_ids": 1, "confidence": 1, "committed": 1}


@dataclass(frozen=True, slots=True)
class _Call:
    """One call.

    Attributes:
        name: For people.
        lengths: (rows,) int32: valid tokens of each row; outputs past them mean nothing.
        inputs: All inputs but states and weights.
        continues: True to start from the states after the chunk, False to start from none.
    """

    name: str
    lengths: npt.NDArray[np.int32]
    inputs: dict[str, Array]
    continues: bool


class Reference:
    """The CPU flavour's graph of one tower.

    Args:
        weights: Input name to float32 array.
    """

    def __init__(self, plan: Path, weights: Mapping[str, Array]) -> None:
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(str(plan), options, ["CPUExecutionProvider"])
        self._weights = dict(weights)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return every output."""
        names = [one.name for one in self._session.get_outputs()]
        wanted = {one.name for one in self._session.get_inputs()}
        feed = {name: array for name, array in inputs.items() if name in wanted}
        return dict(zip(names, self._session.run(names, {**self._weights, **feed}), strict=True))


def compare_tower(
    name: str,
    tower: Tower,
    reference: Reference,
    manifest: Manifest,
    limits: Limits,
    precision: str,
    states: dict[str, Array],
) -> list[Difference]:
    """Compare every output of a tower's calls.

    Args:
        precision: Precision of the engine, a key of `TOLERANCES`.
        states: The context's states after the chunk, by input name: filled by the context tower's
            comparison, which comes first, and read by the denoiser's.

    Returns:
        A difference for each output of each call, named `tower.call.output`.
    """
    interface = interface_of(manifest, name, limits.cache_tokens, tower.engine.inputs)
    found = []
    for call in _calls(name, limits, manifest):
        given = states if call.continues else {}
        empty = _empty_states(interface, len(call.lengths))
        rows = np.arange(len(call.lengths), dtype=np.int32)
        lists = {key: rows for key in ROW_LISTS if key in interface.inputs}
        inputs = {**call.inputs, **lists, **empty, **given}
        inputs = {key: _as_taken(array, interface.inputs[key]) for key, array in inputs.items()}
        outputs = reference.run(inputs)
        ours = _run(tower, interface, inputs, {key: one.shape for key, one in outputs.items()})
        ours, theirs = (
            {f"{name}.{call.name}.{key}": _valid(key, one, call) for key, one in side.items()}
            for side in (ours, outputs)
        )
        found += compare_arrays(ours, theirs, precision)
        if name == "context" and not call.continues:
            states |= {key: outputs[f"{key}_new"] for key in empty}
    return found


def _calls(tower: str, limits: Limits, manifest: Manifest) -> Iterator[_Call]:
    """Yield the calls that serving makes: ragged rows of a chunk, a block and a single token."""
    generator = np.random.default_rng(0)
    rows = min(ROWS, limits.slots)
    chunk = min(CHUNK, limits.max_tokens_per_call, max(1, min(CONTEXT, limits.context) // 2))
    block = min(BLOCK, limits.block_size_max, limits.max_tokens_per_call)
    seen = np.array([chunk, max(1, chunk // 4)][:rows], np.int32)

    def call(name: str, tokens: int, lengths: list[int], context: Array | None) -> _Call:
        valid = np.array(lengths[:rows], np.int32)
        inputs = {
            "ids": generator.integers(0, manifest.model.vocab_size, (rows, tokens), dtype=np.int32),
            "lengths": valid,
            "context_lengths": np.zeros(rows, np.int32) if context is None else context,
        }
        return _Call(name, valid, inputs, context is not None)

    if tower == "context":
        yield call("chunk", chunk, seen.tolist(), None)
        yield call("block", block, [block, max(1, block // 3)], seen)
        yield call("token", 1, [1, 1], seen)
        return
    for made, conditioned in (
        (call("block", block, [block, max(1, block // 3)], seen), 1),
        (call("token", 1, [1, 1], seen - 1), 0),
    ):
        whole = {"conditioned": conditioned, "steps_left": 2, "policy": 0, "seed": 1}
        made.inputs.update({key: np.full(rows, value, np.int32) for key, value in whole.items()})
        made.inputs["threshold"] = np.full(rows, 0.5, np.float32)
        made.inputs["ids"][:, ::2] = manifest.model.mask_token_id
        made.inputs["temperature"] = np.zeros(rows, np.float32)
        yield made


def _empty_states(interface: Interface, rows: int) -> dict[str, Array]:
    """Return zero states; their batch is the first dimension."""
    return {
        name: np.zeros((rows, *spec.shape[1:]), np.float32)
        for name, spec in interface.inputs.items()
        if name.startswith("context.layers.")
    }


def _run(
    tower: Tower,
    interface: Interface,
    inputs: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Array]:
    """Run the engine once and return every output, floats in float32."""
    device = tower.device
    addresses = dict(tower.weights)
    sent = []  # an upload may still read its array
    for name, array in inputs.items():
        sent.append(_encoded(array, interface.inputs[name]))
        addresses[name] = device.allocate(max(sent[-1].nbytes, 1))
        device.upload(addresses[name], sent[-1])
    for name, spec in interface.outputs.items():
        size = math.prod(shapes[name]) * np.dtype(NUMPY[spec.dtype]).itemsize
        cache = addresses.get(name.removesuffix("_new")) if name.endswith("cache_new") else None
        addresses[name] = device.allocate(size) if cache is None else cache
    call = tower.engine.prepare({name: tuple(array.shape) for name, array in inputs.items()})
    call.bind(addresses)
    call.enqueue()
    outputs = {}
    for name, spec in interface.outputs.items():
        raw = np.empty(shapes[name], NUMPY[spec.dtype])
        device.download(raw, addresses[name])
        outputs[name] = _decoded(raw, spec)
    return outputs


def _valid(name: str, array: Array, call: _Call) -> Array:
    """Return an output with zeros where rows have no tokens."""
    suffix, tokens = name.rpartition(".")[2], call.inputs["ids"].shape[1]
    axis = 1 if suffix == "logits" and array.ndim == 3 else TOKEN_AXES.get(suffix)
    if suffix.endswith("cache_new"):
        axis = 2
        after = np.arange(array.shape[2]) - call.inputs["context_lengths"][:, None]
        valid = (after < call.lengths[:, None]) | (after >= tokens)
    elif axis is not None:
        valid = np.arange(array.shape[axis]) < call.lengths[:, None]
    else:
        return array
    shape = [1] * array.ndim
    shape[0], shape[axis] = valid.shape
    return np.where(valid.reshape(shape), array, np.zeros((), array.dtype))


def _as_taken(array: Array, spec: TensorSpec) -> Array:
    """Return an input as the engine sees it: rounded to bf16 where it takes that."""
    return _decoded(_encoded(array, spec), spec)


def _encoded(array: Array, spec: TensorSpec) -> Array:
    """Return an input in the engine's dtype; bf16 as the upper halves of float32, as uint16."""
    if spec.dtype != "BF16":
        return np.ascontiguousarray(array, NUMPY[spec.dtype])
    return np.asarray(to_bfloat16(np.ascontiguousarray(array, np.float32)))


def _decoded(array: Array, spec: TensorSpec) -> Array:
    return np.asarray(from_bfloat16(array)) if spec.dtype == "BF16" else array
