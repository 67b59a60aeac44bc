"""The exported graphs' side of a comparison: a graph, or a part cut out of it, on ONNX Runtime.

Nothing is rebuilt: what runs is the file that was exported, whole or the nodes of one layer, fed
with weights that are read where the manifest says they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx

from twotower_contract.bfloat16 import from_bfloat16, to_bfloat16
from twotower_contract.errors import BundleError, CheckpointError
from twotower_contract.layout import Tower
from twotower_contract.machine import read_at
from twotower_contract.manifest import Manifest
from twotower_contract.onnxruntime import import_onnxruntime
from twotower_contract.quantized import decode, scale_names
from twotower_contract.shards import NUMPY_DTYPES
from twotower_export.verification.calls import QUERIES

Array = npt.NDArray[Any]
Part = Literal["embeddings", "head"] | int
"""A part of a tower that can be run on its own; a number is a layer."""

HIDDEN: Final = "hidden"
"""Input of a part that starts behind another: the other's hidden states."""

FLOAT: Final = onnx.TensorProto.FLOAT
BFLOAT16: Final = onnx.TensorProto.BFLOAT16
CODED: Final = {
    "tensor(float8e4m3fn)": onnx.TensorProto.FLOAT8E4M3FN,
    "tensor(int32)": onnx.TensorProto.INT32,
}
"""Types of the inputs that hold codes, as ONNX Runtime spells and as ONNX numbers them."""

_PIECE: Final = 1 << 22
"""Elements that are read at a time."""


@dataclass(frozen=True)
class GraphPart:
    """A graph to run.

    Attributes:
        outputs: Name of each output in the graph -> name to report it by.
        optimised: Whether ONNX Runtime may rewrite it.
    """

    model: onnx.ModelProto
    outputs: dict[str, str]
    optimised: bool = True


def whole_graph(model: onnx.ModelProto, tower: Tower, layers: Sequence[int]) -> GraphPart:
    """Return the graph with the hidden states after some layers as further outputs."""
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    for name in hidden_names(tower, layers):
        marked.graph.output.append(_value(name, FLOAT))
    return GraphPart(
        marked, {name: name for name in _compared(output.name for output in marked.graph.output)}
    )


def graph_part(model: onnx.ModelProto, tower: Tower, part: Part, dtype: int = FLOAT) -> GraphPart:
    """One part of a graph: the embeddings, a layer, or the final norm, head and refinement.

    That a part reads the part before it is for `wiring` to check.

    Args:
        dtype: Dtype of its hidden states, as ONNX numbers types.

    Raises:
        BundleError: The graph has no such layer.
    """
    nodes = {node.name: node for node in model.graph.node}
    layers = sum(name.startswith(f"{tower}.layers.") for name in nodes)
    wanted = 0 if part == "embeddings" else layers - 1 if part == "head" else part
    layer = nodes.get(f"{tower}.layers.{wanted}")
    if layer is None:
        raise BundleError(f"the {tower} graph has no node {tower}.layers.{wanted}; export it again")
    if part == "embeddings":
        return _cut(model, {layer.input[0]: embeddings_name(tower)}, None, dtype)
    if part == "head":
        outputs = [output.name for output in model.graph.output if ".layers." not in output.name]
        return _cut(model, {name: name for name in outputs}, layer.output[0], dtype)
    outputs = _compared(layer.output)
    return _cut(model, {name: name for name in outputs}, layer.input[0], dtype)


def hidden_names(tower: Tower, layers: Sequence[int]) -> list[str]:
    """Names of the hidden states after these layers."""
    return [f"{tower}.layers.{index}.hidden" for index in layers]


def embeddings_name(tower: Tower) -> str:
    """Return the name that reports give the output of the embeddings."""
    return f"{tower}.embeddings"


def _compared(outputs: Iterable[str]) -> list[str]:
    """Return the outputs that mean something to whoever runs a graph."""
    return [name for name in outputs if not name.endswith(QUERIES)]


def _value(name: str, dtype: int) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, dtype, None)


def _cut(
    model: onnx.ModelProto, outputs: dict[str, str], start: str | None, dtype: int
) -> GraphPart:
    """Return the nodes that make `outputs`, back to the value `start`, the input `hidden`."""
    producers = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    needed: set[int] = set()
    values, waiting = set[str](), list(outputs)
    while waiting:
        value = waiting.pop()
        if value in values or value == start:
            continue
        values.add(value)
        if value in producers:
            needed.add(producers[value])
            waiting += model.graph.node[producers[value]].input
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    del cut.graph.node[:], cut.graph.input[:], cut.graph.output[:]
    for index in sorted(needed):
        node = cut.graph.node.add()
        node.CopyFrom(model.graph.node[index])
        for place, name in enumerate(node.input):
            if name == start:
                node.input[place] = HIDDEN
    cut.graph.input.extend(given for given in model.graph.input if given.name in values)
    if start is not None:
        cut.graph.input.append(_value(HIDDEN, dtype))
    types = {output.name: output for output in model.graph.output}
    cut.graph.output.extend(types.get(name, _value(name, dtype)) for name in outputs)
    return GraphPart(cut, outputs)


@contextmanager
def _refusals() -> Iterator[None]:
    """Return ONNX Runtime's refusal of a graph as an error of the bundle."""
    state = import_onnxruntime().capi.onnxruntime_pybind11_state
    refusals = (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.NotImplemented,
        state.RuntimeException,
    )
    try:
        yield
    except refusals as error:
        raise BundleError(f"ONNX Runtime refuses it: {error}") from error


class ManifestWeights:
    """Weight inputs, read where a manifest says that they lie.

    Reads pieces instead of mapping: of the experts of a full-size layer only their float32 copy is
    in memory.
    """

    def __init__(self, manifest: Manifest, checkpoint: Path, tower: Tower) -> None:
        self._manifest, self._checkpoint = manifest, checkpoint
        self.inputs = manifest.weights[tower]
        self.parts = {
            part: (one, place)
            for one in self.inputs.values()
            if one.format is not None
            for place, part in enumerate(one.forms("F32"))
        }

    def float32(self, name: str) -> Array:
        """Return a weight input in float32, in the shape of the graph's input."""
        made = np.empty(self.inputs[name].shape, np.float32)
        for target, source in self._sources(name, made):
            if self.inputs[name].format is not None:
                target[...] = self._decoded(source).reshape(-1)
                continue
            for piece, values in self._pieces(source, target):
                if values.itemsize == 2:  # bfloat16 is the upper half of a float32
                    np.left_shift(values, 16, out=piece.view(np.uint32), dtype=np.uint32)
                else:
                    piece[...] = values
        return made

    def bfloat16(self, name: str) -> Array:
        """Return a weight input in bfloat16 as uint16, in the graph input's shape.

        Quantized matrices are decoded and rounded to it, ties to even.

        Raises:
            BundleError: It is stored in float32.
        """
        made = np.empty(self.inputs[name].shape, np.uint16)
        for target, source in self._sources(name, made):
            if self.inputs[name].format is not None:
                target[...] = to_bfloat16(self._decoded(source).reshape(-1))
                continue
            for piece, values in self._pieces(source, target):
                if values.itemsize != 2:
                    raise BundleError(
                        f"{source} is float32, but the graph takes {name} in bfloat16"
                    )
                piece[...] = values
        return made

    def part(self, name: str) -> Array:
        """Return the codes or scales that are an input of a native graph, in its shape.

        Codes of 8 bits come as uint8, words as int32, all else as float32.
        """
        weight, place = self.parts[name]
        dtype, shape = weight.forms("F32")[name]
        names = ((one, *scale_names(one, weight.dtype))[place] for one in weight.sources)
        stored = np.stack([self._whole(one) for one in names])
        if dtype == "F8_E4M3":
            stored = stored.swapaxes(-1, -2)
        elif dtype == "I32":
            stored = stored.reshape(-1).view(np.int32)
        elif stored.dtype == np.uint16:
            stored = from_bfloat16(stored)
        return np.ascontiguousarray(stored.reshape(shape))

    def _sources(self, name: str, made: Array) -> Iterator[tuple[Array, str]]:
        """Each tensor that a weight input is made of, and where it goes."""
        sources = self.inputs[name].sources
        return zip(made.reshape(len(sources), -1), sources, strict=True)

    def _decoded(self, source: str) -> Array:
        """Return the weights of a quantized matrix in float32."""
        dtype = self._manifest.tensors[source].dtype
        codes, *scales = (self._whole(name) for name in (source, *scale_names(source, dtype)))
        try:
            return np.asarray(decode(np, dtype, codes, scales))
        except ValueError as problem:
            raise CheckpointError(f"{self._checkpoint}: {source}: {problem}") from problem

    def _whole(self, name: str) -> Array:
        """Return a tensor as it is stored."""
        entry = self._manifest.tensors[name]
        made = np.empty(entry.shape, NUMPY_DTYPES[entry.dtype])
        for piece, values in self._pieces(name, made.reshape(-1)):
            piece[...] = values
        return made

    def _pieces(self, source: str, target: Array) -> Iterator[tuple[Array, Array]]:
        """Return the pieces of a tensor's place, and the elements as they are stored."""
        entry = self._manifest.tensors[source]
        shard = self._manifest.shards[entry.shard]
        path = self._checkpoint / shard.file
        stored = np.dtype(NUMPY_DTYPES[entry.dtype])
        count = entry.bytes // stored.itemsize
        if count != target.size:
            raise BundleError(
                f"manifest.json gives {source} {count} elements, but its weight input takes "
                f"{target.size}; export the checkpoint again"
            )
        with path.open("rb", buffering=0) as file:
            offset = shard.data_start + entry.begin
            for start in range(0, count, _PIECE):
                piece = target[start : start + _PIECE]
                size, at = piece.size * stored.itemsize, offset + start * stored.itemsize
                content = read_at(file.fileno(), size, at)
                if len(content) != size:
                    raise CheckpointError(f"{path}: ends inside {source}; restore the file")
                yield piece, np.frombuffer(content, stored)


@dataclass
class GraphSide:
    """Run a graph part; opened, it holds the part's weights."""

    name: str
    part: GraphPart
    weights: ManifestWeights
    _session: Any = None
    _held: dict[str, Any] = field(default_factory=dict)

    def open(self) -> None:
        """Load the graph and its weights.

        Raises:
            BundleError: ONNX Runtime refuses the graph.
        """
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Shapes change from call to call. The arena stays: the experts of a full-size layer are
        # laid out anew in each call, and half of its time would be fresh pages.
        options.enable_mem_pattern = False
        # Threads that wait would take the cores from the other side.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if not self.part.optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # The default order casts the experts of both projections before it multiplies: 2.5 GB.
            options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        content = self.part.model.SerializeToString()
        with _refusals():
            self._session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        of = onnxruntime.OrtValue
        for given in self._session.get_inputs():
            if given.name not in self.weights.inputs.keys() | self.weights.parts.keys():
                continue
            is_part = given.name not in self.weights.inputs or given.type in CODED
            onnx_type = CODED.get(given.type)
            if given.type == "tensor(bfloat16)":
                onnx_type = BFLOAT16
                array = (
                    to_bfloat16(self.weights.part(given.name))
                    if is_part
                    else self.weights.bfloat16(given.name)
                )
            else:
                array = (self.weights.part if is_part else self.weights.float32)(given.name)
            value = (
                of.ortvalue_from_numpy(array)
                if onnx_type is None
                else of.ortvalue_from_numpy_with_onnx_type(array, onnx_type)
            )
            # The value does not keep the array behind it alive.
            self._held[given.name] = (value, array)

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run a call; inputs that the part lacks are left out.

        Raises:
            BundleError: ONNX Runtime stops at a node.
        """
        binding = self._session.io_binding()
        for name, (value, _) in self._held.items():
            binding.bind_ortvalue_input(name, value)
        for given in self._session.get_inputs():
            if given.name not in self._held:
                binding.bind_cpu_input(given.name, feed[given.name])
        for name in self.part.outputs:
            binding.bind_output(name)
        with _refusals():
            self._session.run_with_iobinding(binding)
        return dict(zip(self.part.outputs.values(), binding.copy_outputs_to_cpu(), strict=True))

    def close(self) -> None:
        """Free the session and the weights."""
        self._session = None
        self._held.clear()
