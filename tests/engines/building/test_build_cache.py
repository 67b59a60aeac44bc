"""Building twice: what is found again, what is built anew, and what a killed build leaves.

A flavour that counts stands in for the real builders where only the cache is looked at; two builds
at once and killed builds run the real TensorRT-RTX in real processes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.engine_bundles import (
    descendants,
    json_of,
    run_build,
    start_build,
    write_bundle_of,
)
from tests.support.waiting import wait_until
from twotower_contract.digests import file_sha256
from twotower_contract.engine_set import BUILD_FILE, open_engine_set
from twotower_contract.errors import EngineSetError
from twotower_engines.building import build as build_module
from twotower_engines.building import code_digest as code_digest_module
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.building.build_cache import EngineCache, digest_of
from twotower_engines.building.flavours.flavour import Flavour, Needs, layers_file, traffic_file
from twotower_engines.errors import BuildError
from twotower_engines.planning.sku_lookup import find_sku

RTX = "rtx-pro-6000"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "twotower" / "builds"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle_of(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "bundle")


class CountingFlavour(Flavour):
    """Stands in for TensorRT-RTX: its plans are the graphs, and it counts them."""

    name = "tensorrt-rtx"

    def __init__(self):
        self.built = []
        self.version = "1.0"
        self.flags = []
        self.machine = "x86_64"
        self.engine = {"layers": 1, "types": {"gemm": 1}, "device_memory": 1000}
        self.scratch = None

    def versions(self):
        return {"tensorrt_rtx": self.version}

    def check(self, target):
        pass

    def recipe(self, tower, target):
        return {"profiles": [{"batch": [target.limits.slots] * 3}], "flags": self.flags}

    def build(self, orders, target, progress):
        for tower, order in orders.items():
            self.built.append(tower)
            shutil.copyfile(order.graph, order.engine)
            layers_file(order.engine).write_text('{"Layers": []}')
            traffic_file(order.engine).write_text('{"profiles": []}')
        return {tower: {"engine": self.engine, "scratch": self.scratch} for tower in orders}

    def take(self, size, is_opened):
        """Let engines need so much memory, as their GPU says or else the builder alone."""
        self.engine = {"layers": 1, "types": {}, "device_memory": size} if is_opened else None
        self.scratch = size if not is_opened else None

    def needs(self, target):
        return Needs(self.machine)


@pytest.fixture
def counting(monkeypatch):
    flavour = CountingFlavour()
    flavour.patch = monkeypatch
    monkeypatch.setitem(build_module.FLAVOURS, flavour.name, flavour)
    return flavour


BOTH = ["context", "denoiser"]
OPTIONS = BuildOptions(find_sku(RTX), slots=2, context=64)


def test_the_same_again_is_not_built(bundle, tmp_path, counting):
    made, is_new = build_engines(bundle, tmp_path / "engines", OPTIONS)
    again, is_new_again = build_engines(bundle, tmp_path / "engines", OPTIONS)
    assert (is_new, is_new_again) == (True, False)
    assert counting.built == BOTH
    assert again.build == made.build


def test_another_folder_and_another_sku_take_the_same_plans(bundle, tmp_path, counting):
    first, _ = build_engines(bundle, tmp_path / "engines", OPTIONS)
    there, is_new = build_engines(bundle, tmp_path / "elsewhere", OPTIONS)
    other, _ = build_engines(
        bundle, tmp_path / "engines", replace(OPTIONS, sku=find_sku("rtx-5090"))
    )
    assert is_new
    assert counting.built == BOTH
    assert first.build.plans == there.build.plans == other.build.plans
    assert other.build.sku == "rtx-5090"
    assert other.build.key != first.build.key


def other_version(counting, bundle):
    counting.version = "1.1"


def other_flags(counting, bundle):
    counting.flags = ["REFIT"]


def other_code(counting, bundle):
    """As a developer changes the builder without changing its version."""
    sources = {"twotower_engines": bundle.parent / "sources"}
    real = code_digest_module._folder
    shutil.copytree(real("twotower_engines"), sources["twotower_engines"])
    with (sources["twotower_engines"] / "building/flavours/worker.py").open("a") as stream:
        stream.write("better = True")
    counting.patch.setattr(
        code_digest_module, "_folder", lambda package: sources.get(package) or real(package)
    )


def other_graph(counting, bundle):
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["graphs"]["native"]["context"]
    graph = bundle / entry["file"]
    content = bytearray(graph.read_bytes())
    content[-1] ^= 1
    graph.write_bytes(content)
    entry["sha256"] = file_sha256(graph)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "built"),
    [
        (other_version, BOTH),
        (other_flags, BOTH),
        (other_code, BOTH),
        (other_graph, ["context"]),
    ],
)
def test_what_decides_the_plans_builds_them_anew(copied, tmp_path, counting, change, built):
    build_engines(copied, tmp_path / "engines", OPTIONS)
    counting.built.clear()
    change(counting, copied)
    _, is_new = build_engines(copied, tmp_path / "engines", OPTIONS)
    assert is_new
    assert counting.built == built


def test_other_profiles_build_plans_anew(bundle, tmp_path, counting):
    build_engines(bundle, tmp_path / "engines", OPTIONS)
    build_engines(bundle, tmp_path / "engines", replace(OPTIONS, slots=3))
    assert counting.built == BOTH + BOTH
    build_engines(bundle, tmp_path / "engines", OPTIONS)
    assert counting.built == BOTH + BOTH, "the first plans were still in the cache"


def test_layers_and_kernels_of_a_plan_come_along(bundle, tmp_path, counting):
    for folder in ("engines", "from-the-cache"):
        made, _ = build_engines(bundle, tmp_path / folder, OPTIONS)
        for tower in BOTH:
            assert layers_file(made.engine_path(tower)).read_text() == '{"Layers": []}'
            listing = made.build.traffic[tower]
            assert listing.file == f"{tower}.traffic.json"
            assert listing.sha256 == file_sha256(made.folder / listing.file)
    assert counting.built == BOTH


def test_a_set_of_another_cpu_is_written_anew(bundle, tmp_path, counting):
    made, _ = build_engines(bundle, tmp_path / "engines", OPTIONS)
    assert made.build.machine == "x86_64"
    counting.machine = "aarch64"
    made, is_new = build_engines(bundle, tmp_path / "engines", OPTIONS)
    assert (is_new, made.build.machine) == (True, "aarch64")


@pytest.mark.parametrize("is_opened", [True, False])
def test_engines_that_take_more_than_there_is_are_refused(bundle, tmp_path, counting, is_opened):
    """On a GPU of 2 GiB; what the plan left free may be used."""
    path = tmp_path / "small.toml"
    path.write_text(
        'name = "small"\ncompute_capability = "8.9"\nmemory_gib = 2\n'
        "bandwidth_gb_s = 100\nbf16_tflops = 10\n"
    )
    options = replace(OPTIONS, sku=find_sku(str(path)))
    counting.take(100 << 20, is_opened)
    build_engines(bundle, tmp_path / "engines", options)
    counting.take(1 << 30, is_opened)
    with pytest.raises(BuildError, match=r"context 1\.0 GiB \(planned .*fewer --slots"):
        build_engines(bundle, tmp_path / "engines", replace(options, slots=3))
    assert open_engine_set(tmp_path / "engines").build.limits.slots == 2


def test_what_decides_the_set_alone_writes_only_the_set(copied, tmp_path, counting):
    build_engines(copied, tmp_path / "engines", OPTIONS)
    (copied / "tokenizer_config.json").write_text('{"changed": true}')
    made, is_new = build_engines(copied, tmp_path / "engines", OPTIONS)
    assert is_new
    assert counting.built == BOTH
    assert json.loads((made.folder / "tokenizer_config.json").read_text()) == {"changed": True}


def test_a_changed_plan_in_a_set_is_replaced(bundle, tmp_path, counting):
    made, _ = build_engines(bundle, tmp_path / "engines", OPTIONS)
    made.engine_path("denoiser").write_bytes(b"bit rot")
    again, is_new = build_engines(bundle, tmp_path / "engines", OPTIONS)
    assert is_new
    again.check_engine_files()
    assert counting.built == BOTH


def test_a_changed_plan_in_the_cache_is_built_anew(bundle, tmp_path, counting, cache):
    build_engines(bundle, tmp_path / "engines", OPTIONS)
    for path in cache.glob("*/plan"):
        path.write_bytes(b"bit rot")
    made, _ = build_engines(bundle, tmp_path / "elsewhere", OPTIONS)
    made.check_engine_files()
    assert counting.built == BOTH + BOTH


def test_a_half_written_entry_of_the_cache_is_built_anew(bundle, tmp_path, counting, cache):
    build_engines(bundle, tmp_path / "engines", OPTIONS)
    for path in cache.glob("*/record.json"):
        path.write_text('{"sha')
    build_engines(bundle, tmp_path / "elsewhere", OPTIONS)
    assert counting.built == BOTH + BOTH


def test_a_failed_build_leaves_the_first_in_place(bundle, tmp_path, counting, monkeypatch):
    first, _ = build_engines(bundle, tmp_path / "engines", OPTIONS)

    def fail(orders, target, progress):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(counting, "build", fail)
    with pytest.raises(RuntimeError):
        build_engines(bundle, tmp_path / "engines", replace(OPTIONS, slots=4))
    assert open_engine_set(tmp_path / "engines").build == first.build
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [RTX]


def test_a_digest_does_not_depend_on_order():
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": "1"})


def test_nothing_is_found_in_an_empty_cache(tmp_path):
    assert EngineCache(tmp_path / "none").find("0" * 64) is None


# The real builder, in real processes.


def arguments(bundle, engines, *more):
    return [bundle, "--sku", RTX, engines, "--slots", "2", "--context", "64", "--json", *more]


def partial_leftovers(folder):
    return [path.name for path in folder.glob("**/*partial*")]


@pytest.mark.slow
def test_a_second_real_build_takes_less_than_two_seconds(bundle, tmp_path):
    first = json_of(run_build(*arguments(bundle, tmp_path / "engines")))
    start = time.monotonic()
    second = json_of(run_build(*arguments(bundle, tmp_path / "engines")))
    third = json_of(run_build(*arguments(bundle, tmp_path / "elsewhere")))
    seconds = (time.monotonic() - start) / 2
    assert [first["built"], second["built"], third["built"]] == [True, False, True]
    assert seconds < 2.0
    assert second["plans"] == third["plans"]


def test_two_real_builds_at_once(bundle, tmp_path, cache):
    """Whichever comes first stands still until the other one says that it waits."""
    processes = [start_build(*arguments(bundle, tmp_path / "engines")) for _ in range(2)]
    first, workers = wait_until(
        lambda: next(((one, found) for one in processes if (found := workers_of(one))), None)
    )
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        (second,) = set(processes) - {first}
        said = iter(second.stderr.readline, "")
        assert any("waiting for another build of the same engine" in line for line in said)
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        assert "waiting for another build" not in said
    open_engine_set(tmp_path / "engines").check_engine_files()
    assert [path.name for path in (tmp_path / "engines").iterdir()] == [RTX]
    assert partial_leftovers(cache) == []
    assert len(list(cache.glob("*/plan"))) == 2


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_a_killed_build_leaves_nothing_that_looks_finished(bundle, tmp_path, cache, number, code):
    process = start_build(*arguments(bundle, tmp_path / "engines"))
    workers = wait_until(lambda: workers_of(process))
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == code
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    with pytest.raises(EngineSetError):
        open_engine_set(tmp_path / "engines")
    assert not list((tmp_path / "engines").glob(f"**/{BUILD_FILE}"))
    assert not list(cache.glob("*/plan"))
    if number == signal.SIGINT:
        assert partial_leftovers(tmp_path) == []

    made = json_of(run_build(*arguments(bundle, tmp_path / "engines")))
    assert made["built"] is True
    assert partial_leftovers(tmp_path) == []


def workers_of(process):
    return [pid for pid in descendants(process.pid) if is_worker(pid)]


def is_worker(pid):
    try:
        return b"flavours.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
