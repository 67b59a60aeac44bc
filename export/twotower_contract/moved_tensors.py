"""Why a checkpoint is not the one that was exported, where its tensors only changed places.

The manifest has a digest of a sample of every tensor. So where the content that one tensor should
have is found under the name of another, that can be said: experts in another order, towers that
were swapped, or simply other files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from twotower_contract.errors import listed
from twotower_contract.layout import HEADS
from twotower_contract.shards import Shard, TensorEntry


def moved_tensors(
    recorded: Mapping[str, TensorEntry],
    shards: Sequence[Shard],
    found: Mapping[str, TensorEntry],
    found_shards: Sequence[Shard],
) -> str | None:
    """Return what happened to a manifest's tensors in the checkpoint that was found.

    None where more than their places changed, or nothing.
    """
    if {name: form(entry) for name, entry in recorded.items()} != {
        name: form(entry) for name, entry in found.items()
    }:
        return None
    before = {name: entry.sample for name, entry in recorded.items()}
    now = {name: found[name].sample for name in before}
    if before != now:
        return _moved_content(before, now)
    for name, entry in recorded.items():
        file, start = _place(entry, shards)
        found_file, found_start = _place(found[name], found_shards)
        if (file, start) != (found_file, found_start):  # a runtime maps bytes where they were
            return (
                f"it holds the same weights in other files: {name} begins at byte {found_start} "
                f"of {found_file}, at export at byte {start} of {file}"
            )
    return None


def form(tensor: TensorEntry | None) -> str:
    """Return dtype and shape as text, as `BF16 [8, 4]`; `absent` for None."""
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _moved_content(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Return a sentence if every changed tensor has the sample that another one had; else None."""
    changed = [name for name in before if before[name] != now[name]]
    if Counter(map(before.get, changed)) != Counter(map(now.get, changed)):
        return None
    banks = Counter((_bank(name), before[name]) for name in changed)
    if None not in map(_bank, changed) and banks == Counter((_bank(n), now[n]) for n in changed):
        names = list(dict.fromkeys(f"{_bank(name)}" for name in changed))
        return f"its experts are shuffled: the same matrices in another order in {listed(names)}"
    pairs = dict(_counterparts(before))
    if all(now[name] == before.get(pairs.get(name, "")) for name in changed):
        differ = {name for name, other in pairs.items() if before[name] != before[other]}
        kept = differ - set(changed)
        if not kept - set(HEADS.values()):
            own_head = ", but its own head" if kept else ""
            return f"its towers are swapped: each tower has the other one's tensors{own_head}"
    return f"{len(changed)} of its tensors changed places: {listed(changed)}"


def _place(entry: TensorEntry, shards: Sequence[Shard]) -> tuple[str, int]:
    shard = shards[entry.shard]
    return shard.file, shard.data_start + entry.begin


def _bank(name: str) -> str | None:
    """Return `context_tower.layers.1.mixer (up_proj.weight)`; None unless of an expert."""
    layer, found, rest = name.partition(".experts.")
    return f"{layer} ({rest.partition('.')[2]})" if found else None


def _counterparts(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield both orders of each pair of names for the same tensor of both towers."""
    known = set(names)
    for name in known:
        other = name.replace("context_", "denoiser_", 1)
        if name == HEADS["context"]:
            other = HEADS["denoiser"]
        if other != name and other in known:
            yield name, other
            yield other, name
