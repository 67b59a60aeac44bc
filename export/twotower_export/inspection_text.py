"""Findings of `twotower inspect` as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twotower_contract.errors import printable
from twotower_contract.skus import GIB


def report(found: Mapping[str, Any]) -> str:
    """Return the text that `twotower inspect` prints."""
    return "\n".join(map(printable, _lines(found)))


def _lines(found: Mapping[str, Any]) -> Iterable[str]:
    models = found.get("models", [])
    if len(models) < 2:
        return _described(found, _title(found))
    lines = [f"{found['path']}: engines of {len(models)} models"]
    for number, model in enumerate(models):
        sets = [one for one in found["engines"] if one["model"] == number]
        names = ", ".join(one["build"]["sku"] for one in sets)
        title = f"{names}: engines, {' and '.join(model['towers'])}"
        lines += ["", *_described({**model, "engines": sets}, title)]
    return lines


def _title(found: Mapping[str, Any]) -> str:
    what = {"checkpoint": "TwoTower checkpoint", "bundle": "bundle", "engines": "engines"}
    kind = "single-tower base checkpoint" if found.get("base") else what[found["kind"]]
    return f"{found['path']}: {kind}, {' and '.join(found['towers'])}"


def _described(found: Mapping[str, Any], title: str) -> Iterable[str]:
    """Everything about one model, and what is there of it."""
    yield title
    yield from _head(found)
    yield ""
    yield from _table(found["sizes"])
    yield ""
    yield from _costs(found["sizes"])
    yield from _gpus(found["skus"])


def _head(found: Mapping[str, Any]) -> Iterable[str]:
    if found.get("id"):
        yield f"  {found['id']}@{found['revision']}"
    yield f"  fingerprint {found['fingerprint'][:16]}, {found['shards']} shards"
    model = found["model"]
    dtypes = ", ".join(f"{n} {dtype}" for dtype, n in found["sizes"]["dtypes"].items())
    yield f"  {len(model['pattern'])} layers {model['pattern']}"
    yield f"  computes in {found['dtype']}; tensors: {dtypes}"
    yield f"  mask {found['mask_token_id']}, ends with {found['eos_token_ids']}"
    source = found.get("checkpoint")
    if source is not None:
        revision = f" at {source['revision']}" if source["revision"] else ""
        state = source.get("state")
        yield f"  of {source['id'] or source['path']}{revision}" + (f": {state}" if state else "")
    for file, digest in found["sha256"].items() if found.get("hashed") else ():
        yield f"  sha256 {digest}  {file}"
    for graph in found.get("graphs", ()):
        yield f"  {graph['file']:32} {(graph['bytes'] or 0) / 1e6:8.2f} MB  {graph['state']}"
    for one in found.get("engines", ()):
        yield from _build(one)


def _build(one: Mapping[str, Any]) -> Iterable[str]:
    build = one["build"]
    versions = ", ".join(f"{k} {v}" for k, v in build["versions"].items())
    capability = build["compute_capability"]
    yield (
        f"  {build['sku']}: {build['flavour']}, {build['precision']}"
        + (f", compute capability {capability}" if capability else "")
        + (f" ({versions})" if versions else "")
    )
    limits = ", ".join(f"{k} {v}" for k, v in build["limits"].items())
    yield f"    limits: {limits}"
    for name, plan in build["plans"].items():
        size = "" if plan["bytes"] is None else f" {plan['bytes'] / 1e6:.1f} MB,"
        graph = ", built from another graph than the manifest's" * (plan["graph"] == "changed")
        yield f"    {name}: {plan['file']},{size} {plan['state']}{graph}"
        yield from _builder_saw(build, name, plan)
        for profile in build.get("profiles", {}).get(name, ()):
            ranges = (
                f"{k} {' to '.join(map(str, v))}" for k, v in profile.items() if isinstance(v, list)
            )
            yield f"      profile {profile.get('name')} (least, usual, most): {', '.join(ranges)}"


def _builder_saw(build: Mapping[str, Any], tower: str, plan: Mapping[str, Any]) -> Iterable[str]:
    """Return the builder's report on a graph and its engine; nothing where there is none."""
    report = build.get("extra", {}).get("reports", {}).get(tower, {})
    parsed, engine = report.get("parsed"), report.get("engine")
    if parsed:
        yield f"      graph: {parsed['layers']:,} parsed layers, {len(parsed['inputs']):,} inputs"
    if engine:
        types = ", ".join(f"{count:,} {kind}" for kind, count in engine["types"].items())
        memory = f"{_scaled(engine['device_memory'])}B of device memory"
        yield f"      engine: {engine['layers']:,} layers ({types}), {memory}"
        yield f"        all of them: {Path(plan['file']).with_suffix('.layers.json')}"
    elif parsed and tower not in build.get("traffic", {}):
        yield "      engine: its layers are not known, for a plan is opened on its GPU only"
    if tower in build.get("traffic", {}):
        yield f"      kernels: {build['traffic'][tower]['file']}; --traffic adds up what they move"


def _table(sizes: Mapping[str, Any]) -> Iterable[str]:
    def row(name: str, one: Mapping[str, Any]) -> str:
        tensors = f"{one['tensors']:,}" if "tensors" in one else ""
        gib = f"{one['bytes'] / GIB:.2f}"
        return f"  {name:28}{tensors:>10}{one['parameters']:>18,}{one['bytes']:>18,}{gib:>10}"

    yield f"  {'':28}{'tensors':>10}{'parameters':>18}{'bytes':>18}{'GiB':>10}"
    for tower, one in sizes["towers"].items():
        for name, part in one["parts"].items():
            yield row(f"{tower} {name}", part)
        yield row(f"{tower} tower", {"parameters": one["parameters"], "bytes": one["bytes"]})
    yield row("all", {"parameters": sizes["parameters"], "bytes": sizes["bytes"]})
    per = ", ".join(f"{name} {count:,}" for name, count in sizes["parameters_per_layer"].items())
    yield f"  parameters of one: {per}"


def _costs(sizes: Mapping[str, Any]) -> Iterable[str]:
    for tower, one in sizes["towers"].items():
        yield (
            f"  {tower}: a token uses {_scaled(one['active_parameters_with_embeddings'])} "
            f"parameters, {_scaled(one['active_parameters_per_token'])} without embeddings, "
            f"{_scaled(one['active_parameters_without_head'])} without embeddings and head"
        )
        by_experts = one["bytes_read_per_16_tokens_by_experts"]
        reads = ", ".join(f"{n}: {_scaled(size)}B" for n, size in by_experts.items())
        yield (
            f"    reads {_scaled(one['bytes_read_per_token'])}B for a token, "
            f"{_scaled(one['bytes_read_per_16_tokens'])}B and "
            f"{_scaled(one['flops_per_16_tokens'])}FLOP for 16 (uniform routing)"
        )
        if reads:
            yield f"    for 16 by distinct experts per layer: {reads}"
    tokens = sizes["tokens_per_context_gigabyte"]
    yield (
        f"  context: {sizes['kv_bytes_per_token']:,} bytes per token"
        + (f", {tokens:,} tokens per gigabyte" if tokens else "")
    )
    if tokens:
        contexts = sizes["kv_bytes_by_context"].items()
        yield "    " + ", ".join(f"{_binary(b)}B at {int(n) // 1024}K" for n, b in contexts)
    yield (
        f"  states per sequence: {_binary(sizes['ssm_bytes_per_sequence'])}B of Mamba, "
        f"{_binary(sizes['conv_bytes_per_sequence'])}B of convolutions"
    )
    yield f"  logits of a block of 16: {_binary(sizes['logits_bytes_per_block'])}B"


def _gpus(skus: Mapping[str, Any]) -> Iterable[str]:
    yield f"  one GPU could hold it: {', '.join(skus['one']) or 'none'}"
    if skus["one_per_tower"]:
        yield f"  one GPU per tower: {', '.join(skus['one_per_tower'])}"
    yield "  (weights, 4,096 tokens of context, 5% for workspace; `twotower plan` counts slots)"


def _scaled(value: float) -> str:
    """Four digits and a decimal prefix: `62.45 G`."""
    for prefix in ("", "k", "M"):
        if value < 1000:
            return f"{value:.4g} {prefix}"
        value /= 1000
    return f"{value:.4g} G"


def _binary(value: float) -> str:
    """Three digits and a binary prefix: `1.5 Gi`."""
    for prefix in ("", "Ki", "Mi"):
        if value < 1024:
            return f"{value:.3g} {prefix}" if value < 1000 else f"{value:.0f} {prefix}"
        value /= 1024
    return f"{value:.3g} Gi"
