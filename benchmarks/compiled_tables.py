"""Makes the planner's table of compiled engines: kernels, bytes and scratch memory of a tower.

    python -m benchmarks.compiled_tables    # ten minutes on two cores, no GPU

TensorRT-RTX compiles towers of the released width with a few layers of each kind: as they are, with
FP8 weights, and cut at our plugins. A listing of any call is taken apart into terms
of the sizes of the call. The scratch memory of the largest call is that of the whole tower: how
well the compiler lets results take turns in memory differs with the layers, and the released model
takes up to 1.6 times what a few of its layers do.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.support.compiled import TOWERS, config_of, write_graph
from twotower_contract.json_file import write_json
from twotower_contract.layout import ROW_LISTS
from twotower_contract.traffic import Kernel, Listing, read_listings, traffic_of
from twotower_engines.building.flavours.compiled import signature_of
from twotower_engines.building.flavours.flat_banks import with_flat_banks
from twotower_engines.building.flavours.flavour import Order
from twotower_engines.building.flavours.gpu_graph import gpu_graph
from twotower_engines.building.flavours.jobs import engine_job, engine_recipe
from twotower_engines.building.flavours.process import build_engine_files
from twotower_engines.building.flavours.profiles import Profile, Sizes
from twotower_engines.building.flavours.tensorrt_rtx import LIBRARY, TensorRtRtxFlavour
from twotower_engines.planning.compiled import (
    FORMAT,
    FORMAT_VERSION,
    TABLE_FILE,
    Way,
    units_of,
    value_of_terms,
)

PATTERN = "MEM*EM"
CAPABILITY = "12.0"
WAYS: tuple[Way, ...] = ("bodies", "codes", "kernels")
TERMS = (
    "1",
    "rows",
    "tokens",
    "context",
    "rows * tokens",
    "rows * context",
    "tokens * tokens",
    "tokens * context",
    "rows * tokens * tokens",
    "rows * tokens * context",
)
"""Products of a call's sizes, of which its bytes are a sum."""
MOST = {
    ("context", "bodies"): 256,
    ("context", "codes"): 256,
    ("context", "kernels"): 1024,
    **{("denoiser", way): 64 for way in WAYS},
}
"""Most tokens of a row that a tower is compiled for; the planner plans no larger calls."""
MASK = {"context": "rows * tokens * context", "denoiser": "rows * context"}
"""Elements of a mask: all tokens of a block see the same."""
SLOTS, CONTEXT, LONG = 16, 8192, 32768
CALLS = [
    (rows, tokens, context)
    for rows in (1, 3, 16)
    for tokens in (1, 5, 16, 64)
    for context in (CONTEXT, LONG)
]
"""Calls of which the terms are found: more than terms, with sizes of no common factor."""


def compiled(
    folder: Path,
    tower: str,
    way: Way,
    rows: int,
    tokens: int,
    context: int,
    pattern: str | None = PATTERN,
) -> Listing:
    """Compile a tower for calls up to some size; plugins are kernels of the listing.

    Args:
        pattern: The tower's layers; None: those of the released model.
    """
    name = TOWERS[tower][1]
    path = write_graph(folder, tower, pattern, "fp8" if way == "codes" else None)
    graph = onnx.load(path)
    signature = signature_of(graph if way == "kernels" else with_flat_banks(graph))
    plugins: list[Kernel] = []
    flat: dict[str, Sizes] = {}
    if way == "kernels":
        # here, for the tests of the kernels choose how these are run before they are imported
        from tests.support.cut import cut_at_plugins

        model, plugins = cut_at_plugins(gpu_graph(graph, has_kernels=True), name)
        onnx.save(model, path)
        pairs = config_of().num_experts_per_tok
        usual, most = min(4, rows) * min(16, tokens), rows * tokens
        flat["flat"] = Sizes(1, usual, most)
        flat["pairs"] = Sizes(pairs, pairs * usual, pairs * most)
    sizes = {"batch": Sizes(1, min(4, rows), rows), name: Sizes(1, min(16, tokens), tokens)}
    sizes["context"] = Sizes(context, context, context)  # the room of a cache is one size
    sizes |= dict.fromkeys(ROW_LISTS.values(), Sizes(0, min(4, rows), rows))
    recipe = engine_recipe([Profile("all", sizes | flat)]) | {"compute_capabilities": [CAPABILITY]}
    job = engine_job(Order(path, folder / "engine.plan", recipe))
    build_engine_files(LIBRARY, {tower: job}, 1, lambda tower, text: None)
    _, (listing,) = read_listings(folder / "engine.traffic.json")
    outputs = tuple(one for one in signature[1] if one.name.startswith("context."))
    kernels = (*listing.kernels, *plugins)
    return replace(listing, inputs=signature[0], outputs=outputs, kernels=kernels)


def call_of(tower: str, rows: int, tokens: int, context: int) -> dict[str, int]:
    """Return a call's sizes by the names of the graphs, and those of a cut graph.

    No row draws noise, and none's entropy or logits are asked for, as the defaults of requests say.
    """
    flat = rows * tokens
    names = {"batch": rows, TOWERS[tower][1]: tokens, "context": context}
    names |= dict.fromkeys(ROW_LISTS.values(), 0)
    return {**names, "flat": flat, "pairs": flat * config_of().num_experts_per_tok}


def terms_of(bytes_of: Callable[[int, int, int], float]) -> dict[str, float]:
    """Return the terms of which the bytes of a call are the sum.

    Raises:
        ValueError: They are the sum of something else.
    """
    rows = [[value_of_terms({term: 1.0}, *call) for term in TERMS] for call in CALLS]
    matrix, values = np.array(rows), np.array([bytes_of(*call) for call in CALLS])
    scale = np.abs(matrix).max(axis=0)
    factors = np.linalg.lstsq(matrix / scale, values, rcond=None)[0] / scale
    wrong = np.abs(matrix @ factors - values).max()
    if wrong > 1e-3 * max(values.max(), 1):
        raise ValueError(f"bytes of a call are no sum of {', '.join(TERMS)}: {wrong:,.0f} off")
    return {
        term: round(float(factor), 3)
        for term, factor in zip(TERMS, factors, strict=True)
        if abs(factor) > 0.01
    }


def kinds_of(tower: str, listings: Mapping[int, Listing]) -> dict[str, dict[str, Any]]:
    """Return kernels and terms of a layer of each kind.

    Args:
        listings: By the room of the caches.
    """
    kinds = traffic_of(listings[CONTEXT]).by_kind(PATTERN)
    calls = {
        call: traffic_of(listings[call[2]], call_of(tower, *call)).by_kind(PATTERN)
        for call in CALLS
    }

    def beside(kind: str, *call: int) -> float:
        moved = calls[call[0], call[1], call[2]][kind]
        return moved.total - moved.least

    def of_layer(kind: str) -> dict[str, Any]:
        count = PATTERN.count(kind) or 1
        terms = terms_of(lambda *call: beside(kind, *call) / count)
        return {"kernels": round(kinds[kind].kernels / count, 2), "bytes": terms}

    return {kind: of_layer(kind) for kind in kinds}


def scratch_bytes(listing: Listing, tower: str, rows: int, tokens: int, context: int) -> int:
    """Return the scratch memory of an engine, and for plugins the most that one touches besides.

    Args:
        rows: Rows, tokens of each and room of a cache of the engine's largest call.
    """
    call = call_of(tower, rows, tokens, context)
    own = {one.name for one in (*listing.inputs, *listing.outputs)}
    edges = (
        sum(one.bytes(call) for one in (*kernel.reads, *kernel.writes) if one.name not in own)
        for kernel in listing.kernels
        if kernel.kind == "plugin"
    )
    return (listing.scratch or 0) + max(edges, default=0)


def scratch_of(
    tower: str, few: Mapping[tuple[int, int, int], Listing], whole: Listing
) -> dict[str, float]:
    """Return the terms of the scratch memory: tokens of all rows, the mask, and a rest.

    Args:
        few: Engines of a few layers by their largest call: the smallest engine, others, the largest
            one, and the same with the long context. None of them needs more than the terms say.
        whole: The largest engine with all layers.
    """
    needed = {call: scratch_bytes(one, tower, *call) for call, one in few.items()}
    mask = MASK[tower]
    elements = {call: value_of_terms({mask: 1}, *call) for call in needed}
    least, *_, most, longest = needed
    per_element = (needed[longest] - needed[most]) / (elements[longest] - elements[most])
    needed[most] = max(needed[most], scratch_bytes(whole, tower, *most))
    small, large = (needed[call] - per_element * elements[call] for call in (least, most))
    tokens = {call: call[0] * call[1] for call in needed}
    per_token = (large - small) / (tokens[most] - tokens[least])
    rest = max(
        size - per_element * elements[call] - per_token * tokens[call]
        for call, size in needed.items()
    )
    terms = {"1": rest, "rows * tokens": per_token, mask: per_element}
    return {term: round(value, 3) for term, value in terms.items()}


def main() -> None:
    towers: dict[str, dict[str, Any]] = {}
    for tower in TOWERS:
        towers[tower] = {}
        for way in WAYS:
            calls = [(1, 16), (SLOTS, 16), (SLOTS, MOST[tower, way])]
            engines = [(*call, CONTEXT) for call in calls] + [(*calls[-1], LONG)]
            with tempfile.TemporaryDirectory() as name:
                listings = {call: compiled(Path(name), tower, way, *call) for call in engines}
                largest = {call[2]: listings[call] for call in engines[-2:]}
                whole = compiled(Path(name), tower, way, *engines[-2], None)
                towers[tower][way] = {
                    "kinds": kinds_of(tower, largest),
                    "scratch": scratch_of(tower, listings, whole),
                    "units": units_of(config_of(), tower, way),
                }
            print(tower, way, towers[tower][way], flush=True)
    (version,) = TensorRtRtxFlavour().versions().values()
    day = datetime.date.today().isoformat()
    width = f"layers {PATTERN} of the released width, all of them for scratch memory"
    source = f"TensorRT-RTX {version} for SM120, {width}, {day}"
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "source": source}
    write_json(TABLE_FILE, {**head, "towers": towers})


if __name__ == "__main__":
    main()
