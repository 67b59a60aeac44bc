"""The manifest of a bundle: its types, how it is read and checked, and how it is written.

A bundle is what the exporter wrote for one checkpoint: graphs without weights, the tokenizer, and
`manifest.json`, which says what the model is and which bytes of which shard feed each weight input
of a graph. An engine set carries a copy of the manifest. A manifest that was edited, cut short or
written by another program is refused by the name of its first wrong field.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from twotower_contract.config import ModelConfig
from twotower_contract.errors import BundleError, ConfigError
from twotower_contract.json_file import Document, read_json, write_json
from twotower_contract.layout import TOWERS, Tower, WeightSource, expected_tensors
from twotower_contract.quantized import (
    FORMAT_OF_DTYPE,
    QUANTIZED_DTYPES,
    Format,
    Shape,
    input_forms,
    is_quantizable,
    matrix_name,
    scale_names,
    unpacked_shape,
)
from twotower_contract.shards import ITEM_SIZES, STORED_DTYPES, Shard, TensorEntry

FORMAT: Final = "twotower-bundle"
FORMAT_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
MAX_TOKENS_PER_CALL: Final = 1024
"""Most tokens of one row in one call of a context graph."""
REMEDY: Final = "write the bundle again with `twotower export`"


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where the weights lie.

    Attributes:
        path: Absolute folder at export time.
        id: Hub id, where it came from one.
        revision: Hub revision, where known.
        fingerprint: The sha256 in hex over name, dtype, shape and sampled content of every tensor.
    """

    path: Path
    id: str | None
    revision: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph of the bundle: path relative to it, and sha256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightInput(WeightSource):
    """A weight input of a graph.

    Attributes:
        name: The graph's input.
        dtype: Stored dtype of the sources, in safetensors' spelling; that of the codes where they
            are quantized. The scales are tensors beside each source; see `scale_names`.
        group: Weights of a row that share a scale in `int4`; 0 otherwise.
    """

    name: str
    dtype: str
    group: int = 0

    @classmethod
    def of(cls, name: str, source: WeightSource, tensors: Mapping[str, TensorEntry]) -> WeightInput:
        """Return the input that a weight has in a graph, its sources among `tensors`."""
        first = source.sources[0]
        dtype, group = tensors[first].dtype, 0
        if FORMAT_OF_DTYPE.get(dtype) == "int4":
            (scale,) = scale_names(first, dtype)
            group = source.shape[-1] // tensors[scale].shape[-1]
        return cls(source.how, source.shape, source.sources, name, dtype, group)

    @property
    def input_dtype(self) -> str:
        """Dtype of the graph's input, or of its codes where it is quantized."""
        return "F32" if self.how == "widen" else self.dtype

    @property
    def format(self) -> Format | None:
        """The format of the sources, where they are quantized."""
        return FORMAT_OF_DTYPE.get(self.dtype)

    def forms(self, computed: str) -> dict[str, tuple[str, Shape]]:
        """Return the inputs that a native graph has for it; see `input_forms`."""
        return input_forms(self.name, self.input_dtype, self.shape, computed, self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole manifest.

    Attributes:
        twotower_version: Version that wrote it.
        checkpoint: Where the weights lie.
        model: Sizes of the towers, dtype and special tokens.
        towers: `context`, `denoiser` or both.
        max_tokens_per_call: Most tokens of one row in one call of the context graph.
        shards: The checkpoint's files.
        tensors: Every tensor of the checkpoint by name.
        graphs: `native` and `float32` to the graphs by name.
        weights: Tower to the weight inputs of its graph by name.
        golden: The self-test as it is stored, or None.
        golden_missing: The reason and the request where there is no golden answer, or None.
    """

    twotower_version: str
    checkpoint: CheckpointSource
    model: ModelConfig
    towers: tuple[Tower, ...]
    max_tokens_per_call: int
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    graphs: Mapping[str, Mapping[str, GraphFile]]
    weights: Mapping[str, Mapping[str, WeightInput]]
    golden: dict[str, Any] | None = None
    golden_missing: dict[str, Any] | None = None

    def graph(self, precision: str, name: str) -> GraphFile:
        """Return a graph, for example `graph("float32", "denoiser")`.

        Raises:
            BundleError: The bundle has no such graph.
        """
        try:
            return self.graphs[precision][name]
        except KeyError:
            had = ", ".join(f"{kind}/{one}" for kind, some in self.graphs.items() for one in some)
            raise BundleError(
                f"the bundle has no graph {precision}/{name}, only {had or 'none at all'}; "
                "export the checkpoint again with the towers that you need"
            ) from None


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` of a bundle or of an engine set.

    Raises:
        BundleError: It is missing, of an unknown format or version, malformed, or contradicts
            itself.
    """
    if not (folder / MANIFEST_FILE).is_file():
        raise BundleError(
            f"{folder}: is no bundle, it holds no {MANIFEST_FILE}; "
            "make one with `twotower export CHECKPOINT BUNDLE`"
        )
    return manifest_of_file(folder / MANIFEST_FILE)


def manifest_of_file(path: Path) -> Manifest:
    """Read a manifest, whatever its file is called.

    Raises:
        BundleError: As for `read_manifest`.
    """
    document = read_json(path, BundleError, REMEDY)
    document.check_format(FORMAT, FORMAT_VERSION)
    model = _model(document)
    shards = tuple(shard.record(Shard) for shard in document.items("shards"))
    tensors = {n: entry.record(TensorEntry) for n, entry in document.sections("tensors").items()}
    _check_tensors(document, shards, tensors)
    if not 1 <= document.integer("max_tokens_per_call") <= MAX_TOKENS_PER_CALL:
        raise document.refusal(
            f"the field `max_tokens_per_call` is {document.integer('max_tokens_per_call')}, not 1 "
            f"to {MAX_TOKENS_PER_CALL}"
        )
    graphs = document.section("graphs")
    return document.record(
        Manifest,
        checkpoint=document.section("checkpoint").record(CheckpointSource),
        model=model,
        towers=_towers(document),
        shards=shards,
        tensors=tensors,
        graphs={
            precision: {
                name: one.record(GraphFile) for name, one in graphs.sections(precision).items()
            }
            for precision in ("native", "float32")
        },
        weights=_weights(document, model, tensors),
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`. Write it last: a folder without it is no bundle."""
    values: dict[str, Any] = {one.name: getattr(manifest, one.name) for one in fields(manifest)}
    values |= {
        "checkpoint": asdict(manifest.checkpoint) | {"path": str(manifest.checkpoint.path)},
        "model": manifest.model.model_block(),
        "dtype": manifest.model.dtype,
        "mask_token_id": manifest.model.mask_token_id,
        "eos_token_ids": list(manifest.model.eos_token_ids),
        "shards": [asdict(shard) for shard in manifest.shards],
        "tensors": {name: asdict(entry) for name, entry in manifest.tensors.items()},
        "graphs": {
            precision: {name: asdict(graph) for name, graph in graphs.items()}
            for precision, graphs in manifest.graphs.items()
        },
        "weights": {
            tower: {
                name: {"how": one.how, "shape": one.shape, "sources": one.sources}
                for name, one in inputs.items()
            }
            for tower, inputs in manifest.weights.items()
        },
    }
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(folder / MANIFEST_FILE, header | values)


def _model(document: Document) -> ModelConfig:
    try:
        return ModelConfig.from_block(
            document.section("model"),
            mask_token_id=document.integer("mask_token_id"),
            eos_token_ids=document.integers("eos_token_ids"),
            dtype=document.text("dtype"),
        )
    except ConfigError as error:
        raise BundleError(f"{error}; {REMEDY}") from error


def _towers(document: Document) -> tuple[Tower, ...]:
    towers = document.texts("towers")
    known = tuple(tower for tower in TOWERS if tower in towers)
    if not known or len(known) != len(towers):
        raise document.refusal(
            f"the field `towers` is {list(towers)}, not one or both of {', '.join(TOWERS)}"
        )
    for tower in known:
        if not document.section("weights").values.get(tower):
            raise document.refusal(f"the field `weights: {tower}` is missing or empty")
    return known


def _check_tensors(
    document: Document, shards: tuple[Shard, ...], tensors: Mapping[str, TensorEntry]
) -> None:
    """Refuse a tensor whose bytes do not fit its shape, its dtype or its shard."""
    known = (*STORED_DTYPES, *QUANTIZED_DTYPES)
    for name, entry in tensors.items():
        if entry.dtype not in known:
            raise document.refusal(
                f"the tensor {name} has dtype {entry.dtype!r}, not {', '.join(known)}"
            )
        size = ITEM_SIZES[entry.dtype] * math.prod(entry.shape)
        lies = entry.begin >= 0 and 0 <= entry.shard < len(shards)
        if not lies or entry.bytes != size:
            raise document.refusal(
                f"the tensor {name} lies at bytes {entry.begin} to {entry.end} of shard "
                f"{entry.shard}, but has {size} bytes, and there are {len(shards)} shards"
            )
        shard = shards[entry.shard]
        if shard.data_start + entry.end > shard.size:
            raise document.refusal(f"the tensor {name} ends past the end of {shard.file}")


def _weights(
    document: Document, model: ModelConfig, tensors: Mapping[str, TensorEntry]
) -> dict[str, dict[str, WeightInput]]:
    known = expected_tensors(model) | expected_tensors(model, ("context",), base=True)
    return {
        tower: {name: _weight(name, one, tensors, known) for name, one in inputs.children().items()}
        for tower, inputs in document.sections("weights").items()
    }


def _weight(
    name: str, document: Document, tensors: Mapping[str, TensorEntry], known: Container[str]
) -> WeightInput:
    """Read one weight input; its sources must be tensors of such a model that make up its shape."""
    how, shape = document.text("how"), document.integers("shape")
    sources = document.texts("sources")
    what = f"the field `{document.path}`"
    bad = [one for one in sources if one not in tensors or matrix_name(one) not in known]
    if bad or not sources:
        raise document.refusal(
            f"{what} is made of {(bad or ['nothing'])[0]}, which is not among the tensors, or none "
            "of such a model"
        )
    dtypes = sorted({tensors[source].dtype for source in sources})
    if len(dtypes) > 1:
        raise document.refusal(f"{what} has sources of several dtypes: {', '.join(dtypes)}")
    for source in sources:
        if dtypes[0] not in STORED_DTYPES and not is_quantizable(matrix_name(source)):
            raise document.refusal(f"{what} is made of {source}, which cannot be {dtypes[0]}")
        absent = [one for one in scale_names(source, dtypes[0]) if one not in tensors]
        if absent:
            raise document.refusal(f"{what} lacks the scale {absent[0]} among the tensors")
    first = unpacked_shape(dtypes[0], tensors[sources[0]].shape)
    same = len({tensors[source].shape for source in sources}) == 1
    # `squeeze` may keep an axis of the model that happens to be 1, so only the count must agree
    fits = {
        "as_is": len(sources) == 1 and shape == first,
        "widen": len(sources) == 1 and shape == first,
        "squeeze": len(sources) == 1 and math.prod(shape) == math.prod(first),
        "stack": shape == (len(sources), *first),
    }
    if how not in fits:
        raise document.refusal(f"{what} has the `how` {how!r}, none of {', '.join(fits)}")
    if not (same and fits[how]):
        raise document.refusal(
            f"{what}: {len(sources)} tensors of shape {list(first)} do not make {list(shape)} by "
            f"`{how}`"
        )
    scales = {
        tensors[one].shape for source in sources for one in scale_names(source, dtypes[0])[:1]
    }
    if len(scales) > 1:
        raise document.refusal(f"{what} has scales of several shapes")
    return WeightInput.of(name, WeightSource(how, shape, sources), tensors)  # type: ignore[arg-type]  # checked
