"""The manifest of a bundle, read with types.

A bundle is what the exporter wrote for one checkpoint: graphs without weights, the tokenizer, and
`manifest.json`, which says what the model is and which bytes of which shard feed each weight input
of a graph. An engine set carries a copy of the manifest. This module reads it and checks that it is
consistent in itself; `weights.py` checks it against the checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from twotower_engines.artifacts.document import Document, read_json
from twotower_engines.errors import BundleError

__all__ = [
    "ITEM_SIZES",
    "CheckpointSource",
    "GraphFile",
    "Manifest",
    "ModelConfig",
    "Shard",
    "TensorEntry",
    "WeightInput",
    "read_manifest",
]

FORMAT = "twotower-bundle"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"

ITEM_SIZES = {"BF16": 2, "F32": 4}
"""Bytes per element of the dtypes, in safetensors' spelling, that a checkpoint may hold."""


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """Where the weights lie.

    Attributes:
        path: Absolute folder at export time.
        id: Hub id, where it came from one.
        revision: Hub revision, where known.
        fingerprint: sha256 in hex over the names, dtypes and shapes of all tensors and the sampled
            content of the shards.
    """

    path: Path
    id: str | None
    revision: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of the towers, under the names of the checkpoint's config where it has them."""

    vocab_size: int
    hidden_size: int
    pattern: str
    norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    n_group: int
    topk_group: int
    max_position_embeddings: int
    time_frequency_dim: int

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        """Indices of the Mamba layers."""
        return tuple(index for index, kind in enumerate(self.pattern) if kind == "M")

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the attention layers."""
        return tuple(index for index, kind in enumerate(self.pattern) if kind == "*")

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.mamba_num_heads * self.mamba_head_dim + 2 * self.n_groups * self.ssm_state_size


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file.

    Attributes:
        file: Path relative to the checkpoint.
        size: Bytes of the whole file.
        data_start: Offset of the first tensor byte: 8 + length of the header.
        sample_sha256: Digest of samples of the content; see `shard_file.sample_digest`.
        sha256: Of the whole content, where the exporter knew it; see `shard_file.named_sha256`.
    """

    file: str
    size: int
    data_start: int
    sample_sha256: str
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one checkpoint tensor lies: bytes `begin` to `end` after the shard's `data_start`.

    Attributes:
        sample: Digest of a part of its content, where the exporter took one; see
            `shard_file.tensor_sample`.
    """

    shard: int
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sample: str | None = None


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph of the bundle: path relative to it, and sha256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class WeightInput:
    """How a weight input of a graph is made of checkpoint tensors.

    Attributes:
        name: The graph's input.
        how: `as_is`, `squeeze` (drop axes of length 1), or `stack` (sources along a new axis 0).
        shape: Shape of the graph's input.
        sources: Names of the checkpoint tensors.
        dtype: Stored dtype of the sources, in safetensors' spelling.
    """

    name: str
    how: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole manifest. `golden` is the self-test as it is stored, or None."""

    twotower_version: str
    checkpoint: CheckpointSource
    model: ModelConfig
    dtype: str
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    towers: tuple[str, ...]
    max_tokens_per_call: int
    shards: tuple[Shard, ...]
    tensors: dict[str, TensorEntry]
    graphs: dict[str, dict[str, GraphFile]]
    weights: dict[str, dict[str, WeightInput]]
    golden: dict[str, object] | None

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
        BundleError: It is missing, of an unknown format or version, or contradicts itself.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise BundleError(
            f"{folder}: is no bundle, it holds no {MANIFEST_FILE}; "
            "make one with `twotower export CHECKPOINT BUNDLE`"
        )
    return manifest_from_document(read_json(path, BundleError))


def manifest_from_document(document: Document) -> Manifest:
    """Return the manifest that a parsed `manifest.json` describes.

    Raises:
        BundleError: As for `read_manifest`.
    """
    document.check_format(FORMAT, FORMAT_VERSION)
    source = document.section("checkpoint")
    tensors = {name: _tensor(entry) for name, entry in document.sections("tensors").items()}
    golden = document.values.get("golden")
    manifest = Manifest(
        twotower_version=document.text("twotower_version"),
        checkpoint=CheckpointSource(
            path=Path(source.text("path")),
            id=source.optional_text("id"),
            revision=source.optional_text("revision"),
            fingerprint=source.text("fingerprint"),
        ),
        model=_model(document.section("model")),
        dtype=document.text("dtype"),
        mask_token_id=document.integer("mask_token_id"),
        eos_token_ids=document.integers("eos_token_ids"),
        towers=document.texts("towers"),
        max_tokens_per_call=document.integer("max_tokens_per_call"),
        shards=tuple(_shard(shard) for shard in document.items("shards")),
        tensors=tensors,
        graphs={
            precision: {
                name: GraphFile(graph.text("file"), graph.text("sha256"))
                for name, graph in graphs.children().items()
            }
            for precision, graphs in document.sections("graphs").items()
        },
        weights={
            tower: {name: _weight(name, one, tensors) for name, one in inputs.children().items()}
            for tower, inputs in document.sections("weights").items()
        },
        golden=golden if isinstance(golden, dict) else None,
    )
    _check_ranges(manifest, document.where)
    return manifest


def _model(document: Document) -> ModelConfig:
    readers = {"int": document.integer, "float": document.number, "str": document.text}
    readers["bool"] = document.boolean
    values = {field.name: readers[str(field.type)](field.name) for field in fields(ModelConfig)}
    model = ModelConfig(**values)  # type: ignore[arg-type]  # each was read by its field's own type
    unknown = sorted(set(model.pattern) - set("ME*"))
    if unknown:
        raise BundleError(f"{document.where}: pattern letter {unknown[0]!r} is none of M, E and *")
    return model


def _shard(document: Document) -> Shard:
    return Shard(
        file=document.text("file"),
        size=document.integer("size"),
        data_start=document.integer("data_start"),
        sample_sha256=document.text("sample_sha256"),
        sha256=document.optional_text("sha256"),
    )


def _tensor(document: Document) -> TensorEntry:
    return TensorEntry(
        shard=document.integer("shard"),
        dtype=document.text("dtype"),
        shape=document.integers("shape"),
        begin=document.integer("begin"),
        end=document.integer("end"),
        sample=document.optional_text("sample"),
    )


def _weight(name: str, document: Document, tensors: dict[str, TensorEntry]) -> WeightInput:
    """Read one weight input and check that its sources make up its shape."""
    how, shape, sources = (
        document.text("how"),
        document.integers("shape"),
        document.texts("sources"),
    )
    missing = [source for source in sources if source not in tensors]
    if missing or not sources:
        raise BundleError(
            f"{document.where}: source {(missing or ['none'])[0]} is not in `tensors`"
        )
    dtypes = sorted({tensors[source].dtype for source in sources})
    if len(dtypes) > 1:
        raise BundleError(f"{document.where}: its sources have several dtypes: {', '.join(dtypes)}")
    first = tensors[sources[0]].shape
    same = all(tensors[source].shape == first for source in sources)
    made = {
        "as_is": (first, 1),
        "squeeze": (tuple(size for size in first if size != 1), 1),
        "stack": ((len(sources), *first), len(sources)),
    }
    if how not in made:
        raise BundleError(f"{document.where}: `how` is {how!r}, none of {', '.join(made)}")
    # `squeeze` may keep an axis of the model that happens to be 1, so only the count must agree
    fits = math.prod(shape) == math.prod(first) if how == "squeeze" else made[how][0] == shape
    if not (same and fits and made[how][1] == len(sources)):
        raise BundleError(
            f"{document.where}: {len(sources)} tensors of shape {list(first)} do not make "
            f"{list(shape)} by `{how}`; export the checkpoint again"
        )
    return WeightInput(name, how, shape, sources, dtypes[0])


def _check_ranges(manifest: Manifest, where: str) -> None:
    """Refuse a tensor whose bytes do not fit its shape, its dtype or its shard."""
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in ITEM_SIZES:
            raise BundleError(f"{where}: {name} has dtype {tensor.dtype}, none of BF16 and F32")
        expected = math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]
        if tensor.begin < 0 or tensor.end - tensor.begin != expected:
            raise BundleError(
                f"{where}: {name} takes bytes {tensor.begin} to {tensor.end}, but "
                f"{tensor.dtype} {list(tensor.shape)} has {expected}"
            )
        if not 0 <= tensor.shard < len(manifest.shards):
            raise BundleError(f"{where}: {name} lies in shard {tensor.shard}, which is not listed")
        shard = manifest.shards[tensor.shard]
        if shard.data_start + tensor.end > shard.size:
            raise BundleError(f"{where}: {name} ends past the end of {shard.file}")
