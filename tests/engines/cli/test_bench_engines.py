"""`twotower bench ENGINES`: the latency of each kind of call, without a server."""

from __future__ import annotations

import json

from tests.support.command import twotower
from twotower_contract.engine_set import open_engine_set
from twotower_engines.generation.costs import costs_of_engines


def test_each_call_is_measured_with_each_number_of_rows(random_engines, tmp_path) -> None:
    folder, saved = random_engines().folder, tmp_path / "calls.json"
    ran = twotower("bench", folder, "--duration", 0.001, "--save", saved)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(saved.read_text())
    engines = open_engine_set(folder)
    limits, costs = engines.build.limits, costs_of_engines(engines)
    rows = [2**n for n in range(limits.slots.bit_length())]
    block, chunk = min(16, limits.block_size_max), limits.max_tokens_per_call
    tokens = {"denoise": block, "token": 1, "commit": block, "prefill": chunk, "predict": 1}
    measured = [(one["call"], one["rows"], one["tokens"]) for one in result["calls"]]
    assert measured == [(call, n, count) for call, count in tokens.items() for n in rows]
    for one in result["calls"]:
        kind = costs.denoise if one["call"] in ("denoise", "predict") else costs.extend
        assert one["floor_ms"] == 1e3 * kind(one["rows"], one["tokens"])
        assert 0 < one["median_ms"] <= one["p99_ms"]
        assert one["calls"] >= 5
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert lines[0][:3] == ["call", "rows", "tokens"]
    assert [(line[0], int(line[1]), int(line[2])) for line in lines[1:]] == measured


def test_what_is_no_engine_set_is_refused(tmp_path) -> None:
    ran = twotower("bench", tmp_path)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
