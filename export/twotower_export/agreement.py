"""Whether a checkpoint is the one that a bundle was exported from, and if not, in what it differs.

Every tensor's sampled digest is in the manifest, so the common mistakes are told apart by name:
another revision, towers that changed places, experts in another order.
"""

from __future__ import annotations

from collections.abc import Iterator

from twotower_contract.errors import BundleError, listed
from twotower_contract.manifest import Manifest
from twotower_contract.moved_tensors import form, moved_tensors
from twotower_export.checkpoint import Checkpoint, fingerprint, with_full_digests
from twotower_export.progress import Progress, silent


def check_agreement(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not the bundle's.

    Raises:
        BundleError: It is another one; the message says what differs.
    """
    if fingerprint(manifest.tensors) != manifest.checkpoint.fingerprint:
        raise BundleError(
            "the bundle's manifest contradicts itself: its tensors do not have its fingerprint; "
            "write it again with `twotower export`"
        )
    difference = _difference(manifest, checkpoint)
    if difference is not None:
        source = manifest.checkpoint
        name = f"{source.id}@{source.revision}" if source.id else source.path
        raise BundleError(
            f"{checkpoint.path}: is not the checkpoint of this bundle: {difference}; name the "
            f"checkpoint that was exported ({name}), or export this one"
        )


def check_every_byte(
    manifest: Manifest, checkpoint: Checkpoint, progress: Progress = silent
) -> None:
    """Refuse a checkpoint whose shards are not, byte for byte, those that were exported.

    Raises:
        BundleError: A digest is another one, or was not recorded at export.
        CheckpointError: A shard cannot be read, or a cache names it by another digest.
    """
    missing = [shard.file for shard in manifest.shards if not shard.sha256]
    if missing:
        raise BundleError(
            f"the bundle records no sha256 of {listed(missing)}, so its content cannot be proved; "
            "export it again with --full, or from a Hugging Face cache, whose files are named by it"
        )
    check_agreement(manifest, with_full_digests(checkpoint, progress))


def _difference(manifest: Manifest, checkpoint: Checkpoint) -> str | None:
    """Return the most likely reason, the most specific one first; None if nothing differs."""
    recorded, found = manifest.tensors, checkpoint.tensors
    other = [
        f"{name} is {form(found.get(name))}, not {form(recorded.get(name))}"
        for name in sorted(recorded.keys() | found.keys())
        if form(recorded.get(name)) != form(found.get(name))
    ]
    if other:
        return f"other tensors: {listed(other)}"
    moved = moved_tensors(recorded, manifest.shards, found, checkpoint.shards)
    if moved is not None:
        return moved
    changed = [name for name in recorded if recorded[name].sample != found[name].sample]
    revision = manifest.checkpoint.revision
    if changed and revision and checkpoint.revision and revision != checkpoint.revision:
        return f"wrong revision: it is {checkpoint.revision}, the bundle's is {revision}"
    if changed:
        return f"other values in {len(changed)} of {len(found)} tensors: {listed(changed)}"
    files = list(_changed_files(manifest, checkpoint))
    if files:
        return (
            f"the samples of its tensors are the same, but not the whole content of {listed(files)}"
        )
    return None


def _changed_files(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    """Yield files with another digest; the sha256 counts where both sides know it."""
    now = {shard.file: shard for shard in checkpoint.shards}
    for recorded in manifest.shards:
        found = now.get(recorded.file)
        if found is None:  # it holds no tensors
            yield f"{recorded.file} (absent)"
        elif recorded.sha256 and found.sha256 and recorded.sha256 != found.sha256:
            yield f"{recorded.file} (sha256 {found.sha256}, at export {recorded.sha256})"
        elif recorded.sample_sha256 != found.sample_sha256:
            yield recorded.file
