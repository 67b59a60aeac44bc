"""Opens a checkpoint: finds it, checks every header, and ties it to a fingerprint.

Works on a folder as `huggingface_hub` leaves it (links into blobs), on a plain copy, or on a hub
id. Only headers and samples are read, so the full-size model opens in seconds; what is refused is
refused here, before anything is written.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from twotower_contract.config import CONFIG_FILE, ModelConfig, read_config
from twotower_contract.digests import file_sha256
from twotower_contract.engine_set import BUILD_FILE
from twotower_contract.errors import CheckpointError, listed
from twotower_contract.files import refuse_dangling
from twotower_contract.index import INDEX_FILE, SINGLE_FILE, read_index
from twotower_contract.layout import BASE_PREFIX, TOWERS, Tower, expected_tensors, graph_weights
from twotower_contract.machine import read_at
from twotower_contract.manifest import MANIFEST_FILE
from twotower_contract.quantized import (
    FORMAT_OF_DTYPE,
    INT4_GROUPS,
    SCALE_DTYPES,
    codes_name,
    ignored_names,
    is_quantizable,
    scale_names,
    stored_tensors,
)
from twotower_contract.shards import STORED_DTYPES, Shard, TensorEntry, read_shard
from twotower_export import hub
from twotower_export.progress import Progress, silent
from twotower_export.tokens import eos_token_ids

SMALL_FILES: Final = (".json", ".jinja")
"""Files of a checkpoint beside its shards: configuration, index, tokenizer."""

MATRICES: Final = ("_proj.weight", "_proj.weight_packed", "embeddings.weight", "lm_head.weight")
"""Ends of the names of matrices, which training leaves nowhere at 0."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers were checked.

    Attributes:
        path: Absolute folder.
        towers: Towers that it holds.
        base: Whether it is the single-tower base checkpoint, with that one's names.
        id: Hub id, where it came from the hub.
        revision: Hub commit, where known.
        fingerprint: The sha256 in hex over name, dtype, shape and sampled content of every tensor;
            independent of how the tensors are spread over files.
        warnings: Sentences that the user should read.
    """

    path: Path
    config: ModelConfig
    towers: tuple[Tower, ...]
    base: bool
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorEntry]
    id: str | None
    revision: str | None
    fingerprint: str
    warnings: tuple[str, ...] = ()


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    mask_token_id: int | None = None,
    towers: Sequence[Tower] | None = None,
    local_only: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Open and check a checkpoint.

    Args:
        source: A folder, or a hub id (`organisation/name` or `organisation/name@revision`), which
            is downloaded first unless it lies in the local cache.
        revision: The hub revision that it must be.
        mask_token_id: Overrides the configuration's mask id.
        towers: Towers that it must hold; by default whichever it does.
        local_only: Download nothing; a hub id must lie in the cache.
        progress: Called for each shard.

    Raises:
        CheckpointError: It is missing, incomplete, damaged, or holds other towers.
        ConfigError: Its configuration is refused.
        HubError: It could not be fetched.
    """
    folder, identity, warnings = _locate(source, revision, local_only)
    for file in sorted(folder.iterdir()):
        if file.suffix in SMALL_FILES:
            refuse_dangling(file)
    if not (folder / CONFIG_FILE).exists():
        raise CheckpointError(
            f"{folder}: is no checkpoint: it has no {CONFIG_FILE}"
            f"{_hint_of_another_kind(folder)}; name the folder that holds {CONFIG_FILE} and the "
            "safetensors files"
        )
    config = read_config(folder / CONFIG_FILE, mask_token_id=mask_token_id)
    config = replace(config, eos_token_ids=eos_token_ids(folder, config))
    shards, tensors = _read_shards(folder, progress)
    prefixes = {name.partition(".")[0] for name in tensors}
    base = BASE_PREFIX in prefixes and not {"context_tower", "denoiser_tower"} & prefixes
    context_only = "context_tower" in prefixes and not {"denoiser_tower", "lm_head"} & prefixes
    held: tuple[Tower, ...] = ("context",) if base or context_only else TOWERS
    if towers is not None and not set(towers) <= set(held):
        kind = "the single-tower base checkpoint" if base else "a checkpoint of one tower"
        raise CheckpointError(
            f"{folder}: is {kind}: it holds a context tower and no denoiser, so it can only "
            "generate autoregressively; export that tower with --towers context, or name a "
            "TwoTower checkpoint"
        )
    _check_tensors(folder, config, held, base, tensors)
    _check_scales(folder, shards, tensors)
    return Checkpoint(
        path=folder,
        config=config,
        towers=held,
        base=base,
        shards=shards,
        tensors=tensors,
        id=identity[0],
        revision=identity[1],
        fingerprint=fingerprint(tensors),
        warnings=(*warnings, *zero_warnings(folder, tensors)),
    )


def fingerprint(tensors: Mapping[str, TensorEntry]) -> str:
    """sha256 in hex over one line `name dtype shape sample` per tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name} {tensor.dtype} [{shape}] {tensor.sample}\n".encode())
    return digest.hexdigest()


def zero_warnings(folder: Path, tensors: Mapping[str, TensorEntry]) -> list[str]:
    """Warn of matrices that are 0 where they were sampled: a download that is not finished.

    Space for a file may be reserved before its bytes arrive. Vectors and tables may well be 0.
    """
    matrices = [name for name in tensors if name.endswith(MATRICES)]
    zero = [name for name in matrices if tensors[name].is_zero]
    if not zero:
        return []
    return [
        f"{folder}: {len(zero)} of its {len(matrices)} matrices hold only zeros where they were "
        f"sampled: {listed(zero)}; did the download finish? Fetch the checkpoint again, or prove "
        "its bytes with --full"
    ]


def with_full_digests(checkpoint: Checkpoint, progress: Progress = silent) -> Checkpoint:
    """Return the checkpoint with the sha256 of every shard, read whole.

    Raises:
        CheckpointError: A shard's content is not what a Hugging Face cache names it by.
    """
    total = sum(shard.size for shard in checkpoint.shards)
    before = 0
    hashed = []
    for shard in checkpoint.shards:

        def told(done: int, before: int = before) -> None:
            progress("hashing megabytes", (before + done) // 10**6, total // 10**6)

        path = checkpoint.path / shard.file
        try:
            digest = file_sha256(path, told)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        if shard.sha256 not in (None, digest):
            raise CheckpointError(
                f"{path}: its content has sha256 {digest}, but the cache names it "
                f"{shard.sha256}: it was damaged; delete it and fetch the checkpoint again"
            )
        hashed.append(replace(shard, sha256=digest))
        before += shard.size
    return replace(checkpoint, shards=tuple(hashed))


def _locate(
    source: str | Path, revision: str | None, local_only: bool
) -> tuple[Path, tuple[str | None, str | None], list[str]]:
    """Return the folder, its (hub id, commit), and warnings; download a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve(), hub.cached_identity(folder), _check_revision(folder, revision)
    if folder.exists():
        raise CheckpointError(
            f"{folder}: is a file, not a checkpoint; name the folder that it lies in"
        )
    name, at, pinned = str(source).partition("@")
    if not hub.is_id(name):
        raise CheckpointError(
            f"{folder}: there is no such folder; name a folder with {CONFIG_FILE} and safetensors "
            "files, or a hub id such as nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16@REVISION"
        )
    if at and revision is not None and revision != pinned:
        raise CheckpointError(
            f"{source}: names revision {pinned!r}, but --revision says {revision!r}; give one"
        )
    return hub.fetch(name, (pinned if at else None) or revision, local_only=local_only)


def _check_revision(folder: Path, revision: str | None) -> list[str]:
    """Refuse a folder of another revision than was asked for; warnings about an unknown one."""
    commit = hub.cached_identity(folder)[1]
    if revision is None and commit is None:
        return [
            f"{folder}: its revision is unknown: this is a plain folder, not a snapshot in a "
            "Hugging Face cache; the bundle is tied to its content, but cannot name its commit"
        ]
    if revision is None:
        return []
    if commit is None:
        raise CheckpointError(
            f"{folder}: --revision {revision} cannot be checked: this is a plain folder, not a "
            "snapshot in a Hugging Face cache; leave --revision out or name the hub id"
        )
    meant = hub.cached_reference(folder, revision)
    if not hub.is_same_commit(meant or revision, commit):
        raise CheckpointError(
            f"{folder}: is revision {commit}, not {revision}"
            + (f", which is {meant} in this cache" if meant else "")
            + "; name the other snapshot, or the hub id"
        )
    return []


def _hint_of_another_kind(folder: Path) -> str:
    """Recognise the folders that are named instead of a checkpoint most often."""
    for file, what in ((MANIFEST_FILE, "a bundle"), (BUILD_FILE, "an engine set")):
        if (folder / file).is_file():
            return f" (it looks like {what})"
    snapshots = sorted(folder.glob(f"snapshots/*/{CONFIG_FILE}"))
    if snapshots:
        return f" (it looks like a Hugging Face cache: try {snapshots[-1].parent})"
    return ""


def _read_shards(
    folder: Path, progress: Progress
) -> tuple[tuple[Shard, ...], dict[str, TensorEntry]]:
    """Every shard that the index names, and its tensors, which the headers must name too."""
    index = read_index(folder)
    files = sorted(set(index.values())) if index is not None else [SINGLE_FILE]
    shards: list[Shard] = []
    tensors: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for number, file in enumerate(files):
        progress("reading shards", number, len(files))
        shard, found = read_shard(folder / file, file, number)
        shards.append(shard)
        if index is not None:
            named = {name for name, where in index.items() if where == file}
            problems += [f"{name}: not in {file}" for name in sorted(named - set(found))]
            problems += [
                f"{name}: in {file}, but the index says {index.get(name, 'nothing of it')}"
                for name in sorted(set(found) - named)
            ]
        tensors |= found
    progress("reading shards", len(files), len(files))
    if problems:
        raise CheckpointError(
            f"{folder}: {INDEX_FILE} disagrees with the shards' headers: {listed(problems)}; "
            "take index and shards of the same revision"
        )
    return tuple(shards), tensors


def _check_tensors(
    folder: Path,
    config: ModelConfig,
    towers: Sequence[Tower],
    base: bool,
    tensors: Mapping[str, TensorEntry],
) -> None:
    """Refuse missing, unexpected, misshapen and wrongly typed tensors, each by name."""
    expected = expected_tensors(config, towers, base=base)
    problems: list[str] = []
    known: set[str] = set()
    for name, shape in expected.items():
        wanted = _stored_form(name, shape, tensors)
        problems += _unlike(wanted, tensors)
        known |= {*wanted, *(ignored_names(name) if is_quantizable(name) else ())}
    problems += [f"{name} is unknown" for name in tensors if name not in known]
    problems += _mixed_experts(config, towers, base, tensors)
    if problems:
        raise CheckpointError(
            f"{folder}: its tensors are not those of its {CONFIG_FILE}: {listed(problems)}; take "
            "both of the same revision, with weights in BF16 or as `twotower quantize` and "
            "ModelOpt write them"
        )


def _stored_form(
    name: str, shape: tuple[int, ...], tensors: Mapping[str, TensorEntry]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of the tensors that hold one of the model's, whichever form it has."""
    codes = tensors.get(codes_name(name, tensors))
    format_ = None if codes is None else FORMAT_OF_DTYPE.get(codes.dtype)
    if format_ is None or not is_quantizable(name):
        is_plain = codes is not None and codes.dtype in STORED_DTYPES
        return {name: (codes.dtype if codes is not None and is_plain else "BF16 or F32", shape)}
    scale = tensors.get(f"{name}_scale")
    group, dtype = 1, SCALE_DTYPES[0]
    if scale is not None and format_ == "int4":
        groups = [size for size in INT4_GROUPS if scale.shape == (shape[0], shape[1] // size)]
        group = groups[0] if groups else INT4_GROUPS[0]
        dtype = scale.dtype if scale.dtype in SCALE_DTYPES else dtype
    return stored_tensors(format_, name, (shape[0], shape[1]), group, dtype)


def _unlike(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Mapping[str, TensorEntry]
) -> Iterator[str]:
    """Yield what is missing of a tensor's stored form, or has another dtype or shape."""
    first = next(iter(wanted))
    for name, (dtype, shape) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            reason = "" if name == first else f", without which {first} cannot be read"
            yield f"{name} is missing{reason}"
        elif tensor.shape != shape:
            yield f"{name} has shape {list(tensor.shape)}, not {list(shape)}"
        elif tensor.dtype == "F16":
            yield f"{name} is float16, not bfloat16 or float32"
        elif tensor.dtype != dtype:
            yield f"{name} is {tensor.dtype}, not {dtype}"


def _check_scales(
    folder: Path, shards: Sequence[Shard], tensors: Mapping[str, TensorEntry]
) -> None:
    """Refuse a scale of a whole matrix that is no number above 0: swapped, or never written."""
    wrong = []
    for codes, entry in tensors.items():
        for name in scale_names(codes, entry.dtype):
            scale = tensors[name]
            if scale.shape == ():
                shard = shards[scale.shard]
                with (folder / shard.file).open("rb", buffering=0) as file:
                    content = read_at(file.fileno(), 4, shard.data_start + scale.begin)
                (value,) = struct.unpack("<f", content)
                if not 0 < value < math.inf:
                    wrong.append(f"{name} is {value:g}")
    if wrong:
        raise CheckpointError(
            f"{folder}: a scale must be a finite number above 0: {listed(wrong)}; quantize the "
            "checkpoint again, or download it again"
        )


def _mixed_experts(
    config: ModelConfig, towers: Sequence[Tower], base: bool, tensors: Mapping[str, TensorEntry]
) -> list[str]:
    """Experts of one layer are stacked into one input, so they must share a dtype."""
    problems = []
    for tower in towers:
        for name, weight in graph_weights(config, tower, base=base).items():
            sources = [codes_name(one, tensors) for one in weight.sources]
            dtypes = {tensors[one].dtype for one in sources if one in tensors}
            if len(dtypes) > 1 and dtypes <= {*STORED_DTYPES, *FORMAT_OF_DTYPE}:
                problems.append(f"{name} mixes {' and '.join(sorted(dtypes))} over its experts")
    return problems
