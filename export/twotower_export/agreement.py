"""Whether a checkpoint is the one that a bundle was exported from, and if not, in what it differs.

Every tensor's sampled digest is in the manifest, so the common mistakes are told apart by name:
another revision, towers that changed places, experts in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from twotower_export.checkpoint import (
    Checkpoint,
    Progress,
    fingerprint,
    listed,
    with_full_digests,
)
from twotower_export.errors import BundleError
from twotower_export.layout import HEADS
from twotower_export.shards import Tensor


def check_agreement(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not the bundle's.

    Args:
        manifest: the bundle's, as `read_manifest` gives it.
        checkpoint: an open checkpoint.

    Raises:
        BundleError: it is another one; the message says what differs.
    """
    recorded = {name: _tensor(entry) for name, entry in manifest["tensors"].items()}
    if fingerprint(recorded) != manifest["checkpoint"]["fingerprint"]:
        raise BundleError(
            "the bundle's manifest contradicts itself: its tensors do not have its fingerprint; "
            "write it again with `twotower export`"
        )
    if checkpoint.fingerprint == manifest["checkpoint"]["fingerprint"]:
        _check_files(manifest, recorded, checkpoint)
        return
    raise BundleError(
        f"{checkpoint.path}: is not the checkpoint of this bundle: "
        f"{_difference(manifest, recorded, checkpoint)}; name the checkpoint that was exported "
        f"({_named(manifest['checkpoint'])}), or export this one"
    )


def check_every_byte(
    manifest: Mapping[str, Any], checkpoint: Checkpoint, progress: Progress | None = None
) -> None:
    """Refuse a checkpoint whose shards are not, byte for byte, those that were exported.

    Args:
        manifest: the bundle's.
        checkpoint: one that agrees with it.
        progress: told the megabytes that were hashed.

    Raises:
        BundleError: a digest is another one, or was not recorded at export.
        CheckpointError: a shard cannot be read, or a cache names it by another digest.
    """
    missing = [one["file"] for one in manifest["shards"] if not one.get("sha256")]
    if missing:
        raise BundleError(
            f"the bundle records no sha256 of {listed(missing)}, so its content cannot be proved; "
            "export it again with --full, or from a Hugging Face cache, whose files are named by it"
        )
    check_agreement(manifest, with_full_digests(checkpoint, progress))


def _check_files(
    manifest: Mapping[str, Any], recorded: Mapping[str, Tensor], checkpoint: Checkpoint
) -> None:
    """Refuse other files with the same samples: a runtime maps bytes where the manifest says."""
    shards = manifest["shards"]
    for name, tensor in recorded.items():
        of, found = shards[tensor.shard], checkpoint.tensors[name]
        now = checkpoint.shards[found.shard]
        place = (of["file"], of["data_start"] + tensor.begin)
        found_place = (now.file, now.data_start + found.begin)
        if place != found_place:
            raise BundleError(
                f"{checkpoint.path}: holds the weights of this bundle, but in other files: {name} "
                f"begins at byte {found_place[1]} of {found_place[0]}, at export at byte "
                f"{place[1]} of {place[0]}; export this checkpoint again"
            )
    changed = list(_changed_files(shards, checkpoint))
    if changed:
        raise BundleError(
            f"{checkpoint.path}: is not the checkpoint of this bundle: the samples of its tensors "
            f"are the same, but not the whole content of {listed(changed)}; name the checkpoint "
            f"that was exported ({_named(manifest['checkpoint'])}), or export this one"
        )


def _changed_files(shards: Sequence[Mapping[str, Any]], checkpoint: Checkpoint) -> Iterator[str]:
    """Files with another digest; the sha256 counts where both sides know it."""
    now = {shard.file: shard for shard in checkpoint.shards}
    for recorded in shards:
        file, sha256 = recorded["file"], recorded.get("sha256")
        found = now.get(file)
        if found is None:  # it holds no tensors
            yield f"{file} (absent)"
        elif sha256 and found.sha256 and sha256 != found.sha256:
            yield f"{file} (sha256 {found.sha256}, at export {sha256})"
        elif recorded["sample_sha256"] != found.sample_sha256:
            yield file


def _difference(
    manifest: Mapping[str, Any], recorded: Mapping[str, Tensor], checkpoint: Checkpoint
) -> str:
    """One sentence on the most likely reason, the most specific one first."""
    found = checkpoint.tensors
    other = [
        f"{name} is {_form(found.get(name))}, not {_form(recorded.get(name))}"
        for name in sorted(recorded.keys() | found.keys())
        if _form(recorded.get(name)) != _form(found.get(name))
    ]
    if other:
        return f"other tensors: {listed(other)}"
    changed = [name for name in recorded if recorded[name].sample != found[name].sample]
    exchanged = _exchanged_between_towers(changed, recorded, found)
    if exchanged:
        return exchanged
    shuffled = _shuffled_experts(changed, recorded, found)
    if shuffled:
        return f"its experts are shuffled: the same matrices in another order in {listed(shuffled)}"
    revision = manifest["checkpoint"]["revision"]
    if revision and checkpoint.revision and revision != checkpoint.revision:
        return f"wrong revision: it is {checkpoint.revision}, the bundle's is {revision}"
    return f"other values in {len(changed)} of {len(found)} tensors: {listed(changed)}"


def _exchanged_between_towers(
    changed: Sequence[str], recorded: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> str | None:
    """A sentence if all that changed are tensors that took the place of their counterparts."""

    def exchanged(name: str) -> bool:
        other = _counterpart(name)
        return (
            other in recorded
            and found[name].sample == recorded[other].sample
            and found[other].sample == recorded[name].sample
        )

    if not all(map(exchanged, changed)):
        return None
    kept = {
        name
        for name in recorded.keys() - set(changed)
        if _counterpart(name) in recorded
        and recorded[name].sample != recorded[_counterpart(name)].sample
    }
    if kept - set(HEADS.values()):
        return f"tensors changed places with the other tower's: {listed(changed)}"
    return (
        "its towers are swapped: each tower has the other one's tensors"
        f"{', but its own head' if kept else ''}"
    )


def _counterpart(name: str) -> str:
    """The name of the same tensor in the other tower; of a tensor of no tower, its own."""
    for here, there in (("context_", "denoiser_"), ("denoiser_", "context_")):
        if name.startswith(f"{here}tower."):
            return name.replace(here, there, 1)
    return {"lm_head.weight": "context_lm_head.weight"}.get(name, name.removeprefix("context_"))


def _shuffled_experts(
    changed: Sequence[str], recorded: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> list[str]:
    """Layers whose expert matrices are the recorded ones in another order; none if more changed."""
    banks: dict[str, list[str]] = {}
    for name in changed:
        if ".experts." not in name:
            return []
        layer, _, rest = name.partition(".experts.")
        banks.setdefault(f"{layer} ({rest.partition('.')[2]})", []).append(name)
    for names in banks.values():
        if Counter(recorded[n].sample for n in names) != Counter(found[n].sample for n in names):
            return []
    return list(banks)


def _form(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _named(source: Mapping[str, Any]) -> str:
    if source["id"]:
        return f"{source['id']}@{source['revision']}"
    return str(source["path"])


def _tensor(entry: Mapping[str, Any]) -> Tensor:
    return Tensor(
        dtype=entry["dtype"],
        shape=tuple(entry["shape"]),
        shard=entry["shard"],
        begin=entry["begin"],
        end=entry["end"],
        sample=entry["sample"],
    )
