"""The kernels of an engine, from what TensorRT says of it: a builder's log, or the inspector.

The builder of TensorRT-RTX tells a verbose logger the kernels that it made, but writes -1 for each
size that a call decides. Before, it tells the sizes of the network's layers as expressions over the
dynamic dimensions, and each kernel names the layers that it computes. So a tensor has as many
elements as the result of one of those layers, or as the tensor that it was moved from.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twotower_contract.traffic import Kernel, Listing, Size, Tensor, value_of

if TYPE_CHECKING:
    import onnx

KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<reads>.*?), Constants: .*?, "
    r"Outputs: (?P<writes>.*?), TacticName: .*?Metadata: ?(?P<layers>.*)"
)
TENSOR = re.compile(r"Name: ([^,]+?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
LAYER = re.compile(r"ONNX Layer: ([^|\]]+?) ?[|\]]")
INDEX = re.compile(r"\b(?:layers|scale_shift_tables)\.(\d+)\b")
PART = re.compile(r"_myl(\d+)_\d+$")
MOST_LAYERS = 2
"""Layers that a layer's kernel names at most: the end of one may be fused with the next."""
NO_KERNELS = ("shape_call", "signal", "wait")
MOVED = re.compile(r"__myl_(?:Move|Repl|Conc|Resh|Slic|Tran|Cast)+_")
"""Name of a kernel whose output has as many elements as its input, but for padding."""

TYPES = {
    "FLOAT": "FLOAT",
    "FP32": "FLOAT",
    "HALF": "HALF",
    "FP16": "HALF",
    "BFLOAT16": "BF16",
    "BF16": "BF16",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "FP8": "FP8",
    "E8M0": "E8M0",
    "INT4": "INT4",
    "FP4E2M1": "FP4",
    "FP4": "FP4",
}
"""The compiler's name of a type -> that of a listing."""

Shape = tuple[tuple[Size, ...], ...]
"""Factors of each dimension's size."""

Signature = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Inputs and outputs of a graph."""


class BuilderLog:
    """Takes in what the builder of TensorRT-RTX says, and keeps what the listing is made of."""

    def __init__(self) -> None:
        self.scratch: int | None = None
        self._nodes: dict[str, str] = {}
        self._results: dict[str, list[Shape]] = {}
        self._kernels: list[re.Match[str]] = []
        self._layer, self._shape, self._is_result = "", list[tuple[Size, ...]](), False

    def take(self, message: str) -> None:
        """Take in a message."""
        if message.startswith("Layers:\n"):
            self._end_result()
            lines = map(KERNEL.match, message.splitlines())
            self._kernels = [one for one in lines if one and one["kind"] not in NO_KERNELS]
        elif message.startswith("Registering layer: "):
            layer, _, node = message.removeprefix("Registering layer: ").partition(
                " for ONNX node: "
            )
            self._nodes[layer] = node or layer
        elif message.startswith("Max Scratch Memory: "):
            self.scratch = int(message.split()[3])
        elif message.startswith("        ") and "\t" in message:
            self._shape.append(sizes_of(message.rsplit("\t", 1)[1]))
        elif message.startswith("    "):
            self._end_result()
            self._is_result = message.startswith("    Output ")
        elif not message.startswith(" "):
            self._end_result()
            self._layer = message.partition(" ")[2]

    def listings(
        self, signature: Signature, profiles: Sequence[tuple[str, Mapping[str, int]]]
    ) -> list[Listing]:
        """Return the kernels of the engine that was built.

        Args:
            signature: Inputs and outputs of its graph.
            profiles: Name and usual sizes of each profile.
        """
        listings = []
        numbers = sorted({_part_of(one["name"]) for one in self._kernels})
        for index, (name, usual) in enumerate(profiles):
            part = numbers[index] if len(numbers) == len(profiles) else None
            said = [one for one in self._kernels if part in (None, _part_of(one["name"]))]
            sizer = _Sizer(self._results, (*signature[0], *signature[1]), usual)
            for one in said:  # a tensor may be filled before a kernel says what is in it
                sizer.kernel(one)
            sizer.unsized.clear()
            kernels = tuple(map(sizer.kernel, said))
            unsized = tuple(sizer.unsized)
            listings.append(Listing(name, usual, self.scratch, *signature, kernels, unsized))
        return listings

    def _end_result(self) -> None:
        if self._is_result and () not in self._shape:
            layer = self._layer.removesuffix("_AttentionOutput")
            results = self._results.setdefault(self._nodes.get(layer, layer), [])
            if tuple(self._shape) not in results:
                results.append(tuple(self._shape))
        self._shape, self._is_result = [], False


class _Sizer:
    """Finds out the sizes that the builder left open.

    Attributes:
        unsized: Tensors for which there was no way.
    """

    def __init__(
        self,
        results: Mapping[str, Sequence[Shape]],
        known: Iterable[Tensor],
        usual: Mapping[str, int],
    ) -> None:
        self.unsized: dict[str, None] = {}
        self._results, self._usual = results, usual
        self._shapes: dict[str, Shape] = {
            tensor.name: tuple((size,) for size in tensor.sizes) for tensor in known
        }

    def kernel(self, said: re.Match[str]) -> Kernel:
        """Return a kernel with the sizes of all that it reads and writes."""
        named = (name for name, *_ in TENSOR.findall(said["reads"]))
        near = [self._shapes[name] for name in named if name in self._shapes]
        of_layers = [
            shape for node in LAYER.findall(said["layers"]) for shape in self._results.get(node, ())
        ]
        choices = near if MOVED.match(said["name"]) else of_layers
        writes = self._sized(said["writes"], choices or [*near, *of_layers])
        reads = self._sized(said["reads"], [])  # last: it may read what it writes into
        layer = layer_of(said["layers"], (*reads, *writes))
        return Kernel(said["name"], said["kind"], layer, tuple(reads), tuple(writes))

    def _sized(self, text: str, choices: Sequence[Shape]) -> list[Tensor]:
        tensors = []
        for name, dims, kind in TENSOR.findall(text):
            said = [int(dim) for dim in dims.split(",") if dim]
            if -1 in said:
                known = self._shapes.get(name)
                shape = self._best(said, choices) if known is None else known
                if shape is None:
                    self.unsized[name] = None
                    continue
                self._shapes[name] = shape
                sizes = _compact(size for factors in shape for size in factors)
            else:
                sizes = tuple(said)
            tensors.append(Tensor(name, sizes, TYPES[kind.upper()]))
        return tensors

    def _best(self, said: Sequence[int], choices: Sequence[Shape]) -> Shape | None:
        """Return the shape that looks most like one with open sizes; the largest of equals.

        The builder leaves open what a call decides, and nothing else: each open size has a name in
        the shape. A shape with other numbers at the places of the same open sizes lends only these:
        places of new rows in a cache, and lists of tiles of a mask, are of no layer's result.
        """
        count = said.count(-1)
        able = [shape for shape in choices if len(_names(shape)) >= count]
        best = max(able, key=lambda shape: self._likeness(said, shape), default=None)
        if best is None:
            return None
        *is_same, lends, holds, is_divisible, _ = self._likeness(said, best)
        if any(is_same) or (not lends and (holds or is_divisible)):
            return best
        given = iter([size for size in best if _size(size) == -1])
        return tuple(next(given) if size == -1 else (size,) for size in said) if lends else None

    def _likeness(self, said: Sequence[int], shape: Shape) -> tuple[bool | int, ...]:
        wanted = [size for size in said if size != 1]
        given = [size for size in map(_size, shape) if size != 1]
        fixed = math.prod(size for size in said if size > 0)
        elements = math.prod(value_of(s, self._usual) for factors in shape for s in factors)
        return (
            given == wanted,
            _merged(given) == _merged(wanted),
            sorted(given) == sorted(wanted),  # a transposed result has no layer of its own
            [size == -1 for size in given] == [size == -1 for size in wanted],
            not Counter(wanted) - Counter(given),  # the others are merged with open ones
            elements % fixed == 0,
            elements,
        )


def sizes_of(expression: str) -> tuple[Size, ...]:
    """Return the factors of a size that the builder wrote as `(* batch (+ context block))`.

    None are returned where a factor is no number, name or sum of these.
    """
    factors = tuple(_factors(_parsed(re.findall(r"[()]|[^\s()]+", expression))))
    return () if None in factors else tuple(one for one in factors if one is not None)


def layer_of(layers: str, tensors: Iterable[Tensor]) -> int | None:
    """Return the number of the layer that a kernel belongs to; None for one of all layers.

    Args:
        layers: The network's layers that it computes, with the functions that they came from.
        tensors: What it reads and writes; weights and states name their layer.
    """
    for text in (layers, " ".join(tensor.name for tensor in tensors)):
        numbers = list(dict.fromkeys(INDEX.findall(text)))
        if numbers:
            return int(numbers[0]) if len(numbers) <= MOST_LAYERS else None
    return None


def signature_of(model: onnx.ModelProto) -> Signature:
    """Return a graph's inputs and outputs."""
    import onnx

    def described(value: onnx.ValueInfoProto) -> Tensor:
        kind = value.type.tensor_type
        name = onnx.TensorProto.DataType.Name(kind.elem_type).removesuffix("E4M3FN")
        sizes = (dim.dim_value or dim.dim_param for dim in kind.shape.dim)
        return Tensor(value.name, tuple(sizes), TYPES.get(name, name.replace("FLOAT8", "FP8")))

    inputs, outputs = model.graph.input, model.graph.output
    return tuple(map(described, inputs)), tuple(map(described, outputs))


def inspected_listing(
    text: str, signature: Signature, profile: str, usual: Mapping[str, int], scratch: int
) -> Listing:
    """Return the kernels of an engine as TensorRT's inspector describes them for one call.

    Args:
        text: JSON of the inspector, which had an execution context with the call's shapes.
        usual: The call: dynamic dimension to size.
        scratch: Bytes of scratch memory.
    """
    kernels: list[Kernel] = []
    unsized: dict[str, None] = {}

    def tensors(values: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        every = []
        for one in values:
            words = re.findall(r"\w+", one.get("Format/Datatype", "") + one.get("Datatype", ""))
            kind = next((TYPES[w.upper()] for w in reversed(words) if w.upper() in TYPES), None)
            if kind is None or -1 in one["Dimensions"]:
                unsized[one["Name"]] = None
                continue
            every.append(Tensor(one["Name"], tuple(one["Dimensions"]), kind))
        return every

    for layer in json.loads(text)["Layers"]:
        if layer["LayerType"] in NO_KERNELS:
            continue
        reads, writes = tensors(layer["Inputs"]), tensors(layer["Outputs"])
        number = layer_of(layer.get("Metadata", ""), (*reads, *writes))
        kernels.append(
            Kernel(layer["Name"], layer["LayerType"], number, tuple(reads), tuple(writes))
        )
    return Listing(profile, usual, scratch, *signature, tuple(kernels), tuple(unsized))


def _parsed(tokens: list[str]) -> Any:
    token = tokens.pop(0)
    if token != "(":
        return int(token) if re.fullmatch(r"-?\d+", token) else token
    terms = []
    while tokens[0] != ")":
        terms.append(_parsed(tokens))
    tokens.pop(0)
    return terms


def _factors(term: Any) -> Iterable[Size | None]:
    """Yield the factors of a size; one rounded up to a multiple counts as it was."""
    if not isinstance(term, list):
        yield term
    elif term[0] == "*" and len(term) == 3 and _is_part(term[2], term[1]):
        yield from _factors(term[2][1])
    elif term[0] == "*":
        for one in term[1:]:
            yield from _factors(one)
    elif term[0] == "+" and term[1][:1] == ["MUL_ADD"] and term[1][3:] == [-term[2]]:
        yield from term[1][1:3]
    elif term[0] == "+" and not any(isinstance(one, list) for one in term):
        yield " + ".join(map(str, term[1:]))
    else:
        yield None


def _is_part(term: Any, count: Size) -> bool:
    """Whether a term is a size divided by a number, rounded up."""
    return isinstance(term, list) and term[0] == "CEIL_DIV" and term[2] == count


def _compact(sizes: Iterable[Size]) -> tuple[Size, ...]:
    """Return the same product with one number."""
    every = list(sizes)
    factor = math.prod(size for size in every if isinstance(size, int))
    return factor, *(size for size in every if isinstance(size, str))


def _size(factors: Sequence[Size]) -> int:
    """Return a dimension's size, or -1 where it is open."""
    numbers = [one for one in factors if isinstance(one, int)]
    return math.prod(numbers) if len(numbers) == len(factors) else -1


def _names(shape: Shape) -> list[str]:
    """Return the factors of a shape that a call decides."""
    return [one for factors in shape for one in factors if isinstance(one, str)]


def _part_of(kernel: str) -> int:
    """Return the number of the part of an engine that a kernel is in; each profile has one."""
    number = PART.search(kernel)
    return int(number[1]) if number else 0


def _merged(sizes: Sequence[int]) -> list[int]:
    """Return sizes with neighbouring open ones as one."""
    return [
        size
        for place, size in enumerate(sizes)
        if place == 0 or (size, sizes[place - 1]) != (-1, -1)
    ]
