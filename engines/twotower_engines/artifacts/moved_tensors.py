"""Why a checkpoint is not the one that was exported, where its tensors only changed places.

The manifest has a digest of a sample of every tensor. So where the content that one tensor should
have is found under the name of another, that can be said: experts in another order, towers that
were swapped, or simply other files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from twotower_engines.artifacts.manifest import Manifest
from twotower_engines.artifacts.shard_file import read_header, tensor_sample
from twotower_engines.errors import CheckpointError

__all__ = ["explain_difference", "listed"]

LISTED_AT_MOST = 10
HEADS = {"context_lm_head.weight", "lm_head.weight"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What is compared of a tensor: dtype and shape, sample, and the file and offset it lies at."""

    form: tuple[str, tuple[int, ...]]
    sample: str | None
    place: tuple[str, int]


def explain_difference(manifest: Manifest, folder: Path) -> str | None:
    """Look for the manifest's tensors in a folder of shards, whatever these are called.

    Args:
        manifest: What was exported.
        folder: A checkpoint that is known to be another one.

    Returns:
        What happened to the tensors; None where more than their places changed.
    """
    recorded = {}
    for name, entry in manifest.tensors.items():
        shard = manifest.shards[entry.shard]
        place = (shard.file, shard.data_start + entry.begin)
        recorded[name] = _Tensor((entry.dtype, entry.shape), entry.sample, place)
    try:
        found = _tensors(folder)
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return None  # a broken shard, which is reason enough
    if {n: t.form for n, t in found.items()} != {n: t.form for n, t in recorded.items()}:
        return None
    before = {name: tensor.sample for name, tensor in recorded.items()}
    now = {name: tensor.sample for name, tensor in found.items()}
    if before != now:
        return _permutation(before, now)
    moved = [name for name in recorded if recorded[name].place != found[name].place]
    if not moved:
        return None
    file, start = found[moved[0]].place
    return f"it holds the same weights in other files: {moved[0]} begins at byte {start} of {file}"


def _tensors(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a folder's shards; ValueError if two have one name."""
    found: dict[str, _Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, data_start = read_header(path)
        with path.open("rb", buffering=0) as stream:
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if name in found:
                    raise ValueError(f"{name} is in two shards")
                begin, end = entry["data_offsets"]
                sample = tensor_sample(stream, data_start + begin, end - begin)
                form = (str(entry["dtype"]), tuple(entry["shape"]))
                found[name] = _Tensor(form, sample, (path.name, data_start + begin))
    return found


def _permutation(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> str | None:
    """A sentence if every changed tensor has the sample that another one had; else None."""
    changed = [name for name in before if before[name] != now[name]]
    if None in before.values() or Counter(map(before.get, changed)) != Counter(
        map(now.get, changed)
    ):
        return None
    banks = Counter((_bank(name), before[name]) for name in changed)
    if None not in map(_bank, changed) and banks == Counter((_bank(n), now[n]) for n in changed):
        names = list(dict.fromkeys(f"{_bank(name)}" for name in changed))
        return f"its experts are shuffled: the same matrices in another order in {listed(names)}"
    pairs = dict(_counterparts(before))
    if all(now[name] == before.get(pairs.get(name, "")) for name in changed):
        differ = {name for name, other in pairs.items() if before[name] != before[other]}
        kept = differ - set(changed)
        if not kept - HEADS:
            own_head = ", but its own head" if kept else ""
            return f"its towers are swapped: each tower has the other one's tensors{own_head}"
    return f"{len(changed)} of its tensors changed places: {listed(changed)}"


def _bank(name: str) -> str | None:
    """`context_tower.layers.1.mixer (up_proj.weight)` of an expert's matrix; None of others."""
    layer, found, rest = name.partition(".experts.")
    return f"{layer} ({rest.partition('.')[2]})" if found else None


def _counterparts(names: Mapping[str, str | None]) -> Iterator[tuple[str, str]]:
    """Pairs of names for the same tensor of both towers, each in both orders; heads included."""
    for name in names:
        other = name.replace("context_", "denoiser_", 1)
        if name == "context_lm_head.weight":
            other = "lm_head.weight"
        if other != name and other in names:
            yield name, other
            yield other, name


def listed(names: list[str]) -> str:
    """Return at most ten of the names, and how many more there are."""
    more = len(names) - LISTED_AT_MOST
    return ", ".join(names[:LISTED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
