"""Whether a checkpoint is the one that a bundle was exported from, and if not, in what it differs.

Every tensor's sampled digest is in the manifest, so the common mistakes are told apart by name:
another revision, towers that changed places, experts in another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from twotower_export.checkpoint import Checkpoint, fingerprint, listed
from twotower_export.errors import BundleError
from twotower_export.shards import Tensor


def check_agreement(manifest: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that is not the bundle's.

    Args:
        manifest: the bundle's, as `read_manifest` gives it.
        checkpoint: an open checkpoint.

    Raises:
        BundleError: it is another one; the message says what differs.
    """
    if checkpoint.fingerprint == manifest["checkpoint"]["fingerprint"]:
        return
    recorded = {name: _tensor(entry) for name, entry in manifest["tensors"].items()}
    if fingerprint(recorded) != manifest["checkpoint"]["fingerprint"]:
        raise BundleError(
            "the bundle's manifest contradicts itself: its tensors do not have its fingerprint; "
            "write it again with `twotower export`"
        )
    raise BundleError(
        f"{checkpoint.path}: is not the checkpoint of this bundle: "
        f"{_difference(manifest, recorded, checkpoint)}; name the checkpoint that was exported "
        f"({_named(manifest['checkpoint'])}), or export this one"
    )


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
    if _towers_swapped(changed, recorded, found):
        return "its towers are swapped: each tower has the other one's tensors"
    shuffled = _shuffled_experts(changed, recorded, found)
    if shuffled:
        return f"its experts are shuffled: the same matrices in another order in {listed(shuffled)}"
    revision = manifest["checkpoint"]["revision"]
    if revision and checkpoint.revision and revision != checkpoint.revision:
        return f"wrong revision: it is {checkpoint.revision}, the bundle's is {revision}"
    return f"other values in {len(changed)} of {len(found)} tensors: {listed(changed)}"


def _towers_swapped(
    changed: Sequence[str], recorded: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> bool:
    """Whether every changed tensor of the towers has the content of its counterpart."""
    pairs = [(name, _counterpart(name)) for name in changed]
    pairs = [(name, other) for name, other in pairs if other in recorded]
    return bool(pairs) and all(
        found[name].sample == recorded[other].sample for name, other in pairs
    )


def _counterpart(name: str) -> str:
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
