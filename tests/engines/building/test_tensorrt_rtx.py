"""The real TensorRT-RTX on this machine: every graph that the project exports becomes a plan.

This is the compile check for TensorRT: parsed, strongly typed, dynamic shapes, weights as inputs.
What a plan computes needs a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import ROOT, TWOTOWER
from tests.support.compiled import KEPT, config_of
from tests.support.engine_bundles import (
    MemoryWatch,
    run_build,
    start_build,
    write_bundle_of,
    write_full_size_bundle,
)
from tests.support.waiting import wait_until
from twotower_contract.digests import file_state
from twotower_contract.engine_set import Limits, open_engine_set
from twotower_contract.layout import ROW_LISTS
from twotower_contract.manifest import read_manifest
from twotower_contract.skus import known_skus
from twotower_contract.traffic import Tensor, read_listings, traffic_of
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.building.flavours import process as process_module
from twotower_engines.building.flavours import tensorrt_rtx
from twotower_engines.building.flavours.flavour import Order, Target
from twotower_engines.building.flavours.jobs import (
    engine_job,
    engine_recipe,
    graph_inputs,
    read_graph,
)
from twotower_engines.building.flavours.library_build import RefusedError, _check_inputs
from twotower_engines.building.flavours.process import Library, build_engine_files
from twotower_engines.building.flavours.profiles import (
    Profile,
    Sizes,
    narrow_profiles,
    wide_profiles,
)
from twotower_engines.building.flavours.tensorrt_rtx import (
    CAPABILITIES,
    LIBRARY,
    TensorRtRtxFlavour,
)
from twotower_engines.errors import BuildError
from twotower_engines.planning.compiled import compiled_tower
from twotower_engines.planning.plan import WORKSPACE_SLACK
from twotower_engines.planning.sku_lookup import find_sku

pytestmark = pytest.mark.usefixtures("quick_exports")

LIMITS = Limits(slots=4, context=64, max_tokens_per_call=256, block_size_max=64)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def library():
    return LIBRARY


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle_of(tmp_path_factory.mktemp("rtx"))


def no_progress(tower, text):
    pass


def order_of(graph, folder, profiles, **recipe):
    values = {**engine_recipe(profiles), **recipe}
    return Order(graph, folder / f"{graph.stem}.plan", values)


def build(library, graph, folder, profiles, **recipe):
    job = engine_job(order_of(graph, folder, profiles, **recipe))
    return build_engine_files(library, {graph.stem: job}, 1, no_progress)[graph.stem]


def test_an_engine_set_for_an_rtx_gpu(bundle, tmp_path):
    seen = []
    options = BuildOptions(find_sku("rtx-pro-6000"), slots=4, context=64)
    made, _ = build_engines(bundle, tmp_path, options, lambda tower, text: seen.append(tower))
    record = made.build
    assert (record.flavour, record.precision) == ("tensorrt-rtx", "bf16")
    assert record.compute_capability == "12.0"
    assert (record.machine, record.cuda) == (platform.machine(), None)
    written = json.loads((made.folder / "build.json").read_text())
    assert (written["machine"], written["cuda"]) == (platform.machine(), None)
    assert record.extra["compute_capabilities"] == ["12.0"]
    assert record.versions["tensorrt_rtx"] == "1.7.1.116"
    assert TensorRtRtxFlavour().versions() == {"tensorrt_rtx": "1.7.1.116"}
    assert record.extra["placement"] == {"context": 0, "denoiser": 0}
    assert record.profiles["denoiser"] == [
        {"name": "all", "batch": [1, 4, 4], "context": [320, 320, 320], "block": [1, 16, 64]}
        | {dim: [0, 4, 4] for dim in ROW_LISTS.values()}
    ], "a cache has room for the context and one call"
    for tower in ("context", "denoiser"):
        report = record.extra["reports"][tower]
        path = bundle / made.manifest.graph("native", tower).file
        graph = graph_inputs(read_graph(path), path)
        banks = {name for name in graph if name.endswith("experts.down_proj")}
        laid = {f"{name}.flat" for name in banks}
        lists = ROW_LISTS.keys() if tower == "denoiser" else set()
        assert report["parsed"]["inputs"].keys() == graph.keys() - banks | laid | lists > {"ids"}
        assert banks
        assert report["parsed"]["layers"] > 100
        assert report["engine"] is None, "a plan is opened on its GPU only"
        assert report["scratch"] > 0
        assert "TF32" not in report["flags"]
        assert "STRICT_NANS" in report["flags"]
        listing = made.build.traffic[tower]
        assert file_state(made.folder / listing.file, listing.sha256) == "ok"
    assert record.extra["reports"]["denoiser"]["parsed"]["outputs"]["new_ids"] == [
        "INT32",
        [-1, -1],
    ]
    assert record.extra["reports"]["context"]["parsed"]["outputs"]["logits"] == ["FLOAT", [-1, 300]]
    assert set(seen) == {"context", "denoiser"}


@pytest.mark.parametrize(
    ("precision", "name"),
    [("float32", "context"), ("native", "refine")],  # the others: the tests before and after
)
def test_the_other_graphs_of_a_bundle(library, bundle, tmp_path, precision, name):
    graph = bundle / read_manifest(bundle).graph(precision, name).file
    profiles = wide_profiles("context" if name == "context" else "denoiser", LIMITS)
    made = build(library, graph, tmp_path, profiles)
    assert made["bytes"] > 100_000
    if name != "context":
        outputs = {"new_ids", "confidence", "committed", "still_masked"}
        assert outputs <= made["parsed"]["outputs"].keys()


def test_float32_is_float32(library, tmp_path):
    """Left alone, the library sets TF32, and the plan of a float32 product is another one."""
    text = "agraph (float[batch, 8] x, float[8, 8] w) => (float[batch, 8] y) { y = MatMul(x, w) }"
    recipes = {
        "ours": {},
        "cleared": {"flags": {"TF32": False}},
        "set": {"flags": {"TF32": True}},
        "default": {"flags": {}},
    }
    plans, flags = {}, {}
    for name, wanted in recipes.items():
        folder = tmp_path / name
        folder.mkdir()
        made = build(library, tiny_graph(folder, text), folder, BATCH, **wanted)
        plans[name], flags[name] = (folder / "graph.plan").read_bytes(), made["flags"]
    assert "TF32" in flags["default"]
    assert "TF32" not in flags["ours"]
    assert plans["ours"] == plans["cleared"] != plans["set"] == plans["default"]


def test_a_checkpoint_of_float32(library, tmp_path):
    """Its native graphs compute in float32, with no cast at any input."""
    bundle = write_bundle_of(tmp_path, dtype="float32")
    graph = bundle / read_manifest(bundle).graph("native", "denoiser").file
    made = build(library, graph, tmp_path, wide_profiles("denoiser", LIMITS))
    assert made["parsed"]["outputs"]["logits"] == ["FLOAT", [-1, -1, 300]]


def test_a_plan_is_for_the_skus_own_compute_capability(library, tmp_path):
    flavour = TensorRtRtxFlavour()
    plans = {}
    for name in ("a100-80", "rtx-pro-6000"):
        target = Target(find_sku(name), LIMITS, "bf16")
        recipe = flavour.recipe("denoiser", target)
        assert recipe["compute_capabilities"] == [target.sku.compute_capability]
        assert flavour.loader(target) == {"compute_capabilities": recipe["compute_capabilities"]}
        folder = tmp_path / name
        folder.mkdir()
        aimed = {"compute_capabilities": recipe["compute_capabilities"]}
        build(library, tiny_graph(folder, BF16_PRODUCT), folder, BATCH, **aimed)
        plans[name] = (folder / "graph.plan").read_bytes()
    assert plans["a100-80"] != plans["rtx-pro-6000"]


def test_our_compute_capabilities_are_the_builders(library, tmp_path):
    """They are those of its targets that have bfloat16; the table names no others."""
    script = "import tensorrt_rtx as t; print(*t.ComputeCapability.__members__)"
    names = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    known = set(names.split()) - {"NONE", "CURRENT"}
    ours = {f"SM{one.replace('.', '')}" for one in CAPABILITIES}
    assert known == ours | {"SM75"}
    for capability in CAPABILITIES:
        graph = tiny_graph(tmp_path, BF16_PRODUCT)
        assert build(library, graph, tmp_path, BATCH, compute_capabilities=[capability])["bytes"]
    for sku in known_skus().values():
        if "tensorrt-rtx" in sku.flavours:
            assert sku.compute_capability in CAPABILITIES
            assert "1.7.1.116" in sku.sources["flavours"]


def test_a_gpu_that_it_does_not_serve_is_refused():
    target = Target(find_sku("h200"), LIMITS, "bf16")
    with pytest.raises(BuildError, match=r"does not serve NVIDIA H200 .*9\.0.*--flavour tensorrt"):
        TensorRtRtxFlavour().check(target)


@pytest.mark.parametrize("tower", ["context", pytest.param("denoiser", marks=pytest.mark.slow)])
def test_the_narrow_profiles_of_tensorrt(library, bundle, tmp_path, tower):
    """TensorRT's several profiles in one plan: the part of that flavour that needs no GPU."""
    graph = bundle / read_manifest(bundle).graph("native", tower).file
    profiles = narrow_profiles(tower, LIMITS)
    assert len(profiles) > 1
    assert build(library, graph, tmp_path, profiles)["bytes"] > 100_000


def test_a_plan_holds_no_weights(library, tmp_path):
    """Ten times the experts, of 160 KB, and the plan stays as large."""
    sizes = []
    for name, experts in (("few", 4), ("many", 40)):
        from twotower_export.bundle import write_bundle
        from twotower_export.checkpoint import open_checkpoint
        from twotower_export.tiny.checkpoints import write_random_checkpoint

        folder = tmp_path / name
        write_random_checkpoint(folder / "c", "E", 32, 0, "bfloat16", num_experts=experts)
        write_bundle(open_checkpoint(folder / "c"), folder / "b")
        graph = folder / "b" / read_manifest(folder / "b").graph("native", "context").file
        profiles = wide_profiles("context", LIMITS)
        sizes.append(build(library, graph, folder, profiles)["bytes"])
    assert abs(sizes[1] - sizes[0]) < 50_000


# What the library refuses, and what happens to it.


def tiny_graph(folder, text):
    import onnx

    path = folder / "graph.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\n{text}'), path)
    return path


SAMPLED = ROW_LISTS["sampled_rows"]
BATCH = [Profile("all", {"batch": Sizes(1, 2, 4)})]
BF16_PRODUCT = (
    "agraph (bfloat16[batch, 8] x, bfloat16[8, 8] w) => (bfloat16[batch, 8] y) { y = MatMul(x, w) }"
)


def test_a_refused_graph_names_the_node(library, tmp_path):
    text = "agraph (bool[batch, 8] x) => (int64[2, found] y) { y = NonZero(x) }"
    with pytest.raises(BuildError, match=r"TensorRT-RTX refuses the graph graph: NonZero"):
        build(library, tiny_graph(tmp_path, text), tmp_path, BATCH)
    assert not list(tmp_path.glob("*.plan"))


def test_a_dimension_that_no_profile_knows(tmp_path):
    text = "agraph (float[rows, 8] x) => (float[rows, 8] y) { y = Relu(x) }"
    order = order_of(tiny_graph(tmp_path, text), tmp_path, BATCH)
    with pytest.raises(BuildError, match="its dimension `rows` is none of batch"):
        engine_job(order)


def test_a_dimension_without_a_name(tmp_path):
    import onnx

    path = tiny_graph(tmp_path, "agraph (float[batch, 8] x) => (float[batch, 8] y) { y = Relu(x) }")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    onnx.save(model, path)
    with pytest.raises(BuildError, match="x has neither a size nor a name"):
        graph_inputs(read_graph(path), path)


def test_what_is_no_graph(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(BuildError, match="is no ONNX file"):
        read_graph(tmp_path / "a.onnx")


def test_inputs_that_the_parser_sees_otherwise():
    parsed = SimpleNamespace(name="x", shape=(-1, 8))
    network = SimpleNamespace(num_inputs=1, get_input=lambda index: parsed)
    with pytest.raises(RefusedError, match=r"gives x the shape \[-1, 8\]"):
        _check_inputs(network, ((Tensor("x", ("batch", 9), "FLOAT"),), ()))
    with pytest.raises(RefusedError, match=r"differ in \['x', 'y'\]"):
        _check_inputs(network, ((Tensor("y", ("batch", 8), "FLOAT"),), ()))


def test_a_range_that_is_none():
    with pytest.raises(BuildError, match="sizes 4 to 2"):
        Sizes(4, 3, 2)


def load(library, folder):
    """Have a worker load a library, for a graph that is not there."""
    job = {"graph": "none.onnx", "plan": str(folder / "context.plan")}
    return build_engine_files(library, {"context": job}, 1, no_progress)


def fake_module(folder, monkeypatch, name, content):
    """A Python module that stands in for the API, in the worker's process alone."""
    (folder / f"{name}.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Library("TensorRT-RTX", name, "install it")


def test_a_crash_of_the_library_is_an_error_with_a_name(tmp_path, monkeypatch):
    content = "import os, signal, sys\nprint('about to fall', file=sys.stderr, flush=True)\n"
    content += "os.kill(os.getpid(), signal.SIGSEGV)\n"
    library = fake_module(tmp_path, monkeypatch, "crashing_api", content)
    with pytest.raises(BuildError, match=r"signal SIGSEGV, in the phase `loading.*about to fall"):
        load(library, tmp_path)


def test_a_worker_that_is_killed_speaks_of_memory(tmp_path, monkeypatch):
    content = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    library = fake_module(tmp_path, monkeypatch, "killed_api", content)
    with pytest.raises(BuildError, match="may have run out of memory"):
        load(library, tmp_path)


def test_a_library_that_is_not_there(tmp_path):
    library = Library("TensorRT-RTX", "no_such_module", "install it")
    with pytest.raises(BuildError, match=r"cannot be loaded: No module named .*; install it"):
        load(library, tmp_path)


def test_where_it_is_not_installed_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(tensorrt_rtx, "PACKAGES", ("no-such-distribution",))
    with pytest.raises(BuildError, match=r"TensorRT-RTX is not installed.*twotower\[rtx\]"):
        TensorRtRtxFlavour().versions()


def test_what_the_library_says_goes_to_the_log(tmp_path):
    bundle, log = write_bundle_of(tmp_path, "*"), tmp_path / "build.log"
    options = ("--sku", "rtx-pro-6000", "--flavour", "tensorrt-rtx", "--force", "--log", log)
    done = run_build(bundle, *options, tmp_path / "engines", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = log.read_text(encoding="utf-8")
    assert " TensorRT INFO: " in said
    assert " TensorRT VERBOSE: " not in said, "only with -v"
    assert "TensorRT INFO" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting in a namespace needs root here")
def test_a_full_disk_is_not_blamed_on_the_graph(bundle, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    script = f'mount -t tmpfs -o size=2m none {cache} && "$@"'
    build = [
        "build",
        bundle,
        "--sku",
        "rtx-pro-6000",
        "--flavour",
        "tensorrt-rtx",
        tmp_path / "out",
    ]
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "x", *TWOTOWER, *map(str, build)],
        capture_output=True, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "No space left on device" in last
    assert str(cache) in last
    assert not list(tmp_path.glob("out/**/build.json"))


def test_the_old_name_of_the_extra_still_installs_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["rtx-aot"] == ["twotower[rtx]"]


@pytest.mark.slow
def test_workers_that_hold_much_memory_take_turns(library, bundle, tmp_path, monkeypatch):
    """With no memory to share the second tower waits for the first, and both are built."""
    paused = []
    original = process_module._Worker.pause

    def pause(worker, is_wanted):
        paused.append((worker.tower, is_wanted))
        original(worker, is_wanted)

    monkeypatch.setattr(process_module, "MEMORY_TO_SHARE", 0)
    monkeypatch.setattr(process_module._Worker, "pause", pause)
    jobs = {
        tower: engine_job(
            order_of(
                bundle / read_manifest(bundle).graph("native", tower).file,
                tmp_path,
                wide_profiles(tower, LIMITS),
            )
        )
        for tower in ("context", "denoiser")
    }
    made = build_engine_files(library, jobs, 2, no_progress)
    assert made.keys() == jobs.keys()
    assert ("denoiser", True) in paused
    assert ("context", True) not in paused
    assert paused[-1] == ("denoiser", False)


def test_an_interrupted_build_keeps_its_timings(library, bundle, tmp_path):
    """The real builder, asked in the middle to stop: it ends at its next step and writes them."""
    graph = bundle / read_manifest(bundle).graph("native", "denoiser").file
    job = engine_job(order_of(graph, tmp_path, wide_profiles("denoiser", LIMITS)))
    timings = tmp_path / "timing.cache"

    def interrupt(tower, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine_files(
            library, {"denoiser": {**job, "timing_cache": str(timings)}}, 1, interrupt
        )
    assert timings.stat().st_size > 0
    assert not list(tmp_path.glob("*.plan"))
    assert not list(tmp_path.glob("*.partial"))


def test_a_worker_that_does_not_stop_is_killed(tmp_path, monkeypatch):
    content = "import time\ntime.sleep(60)\n"
    library = fake_module(tmp_path, monkeypatch, "sleeping_api", content)
    monkeypatch.setattr(process_module, "GRACE_SECONDS", 0.2)
    worker = process_module._Worker(
        library, "t", {"module": library.module, "timing_cache": "x"}, tmp_path
    )
    worker.start()
    process = worker._process
    wait_until(lambda: b"worker" in Path(f"/proc/{process.pid}/cmdline").read_bytes())
    worker.end()
    assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM)  # the second: before it listens
    assert not Path(f"/proc/{process.pid}").exists()


# The released model's size.


def build_full_size(folder, bundle):
    """Build both towers with an empty cache.

    Returns:
        The build record; seconds from start to end, less those in which the tower that waited
        longer was ready and had no core, because other processes of this machine had them; and the
        most bytes that all processes of the build held at once.
    """
    start = time.monotonic()
    process = start_build(bundle, "--sku", "rtx-pro-6000", folder / "engines", "--json")
    watch = MemoryWatch(process.pid)
    _, stderr = process.communicate(timeout=600)
    seconds = time.monotonic() - start
    peak = watch.stop()
    assert process.returncode == 0, stderr
    build = open_engine_set(folder / "engines").build
    waited = max(report["waited_seconds"] for report in build.extra["reports"].values())
    print(f"{seconds:.1f} s, of which {waited:.1f} s without a core; {peak / 1e9:.2f} GB")
    return build, seconds - waited, peak


@pytest.mark.slow  # both cores for a minute or more: beside another test it measures that one too
def test_both_full_size_towers_in_a_minute_and_two_gigabytes(tmp_path, monkeypatch):
    """On cores of its own. On shared ones the better of two tries counts, less what it waited.

    That difference is what two cores would have needed: caches and memory bandwidth that other
    processes take slow it down still, which the second try is for.
    """
    bundle = write_full_size_bundle(tmp_path)
    best = float("inf")
    for attempt in range(2):  # some 45 s on idle cores; a second try where they were not idle
        folder = tmp_path / str(attempt)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        build, seconds, peak = build_full_size(folder, bundle)
        assert peak < 2e9
        best = min(best, seconds)
        if best < 60:
            break
    assert best < 60
    reports = build.extra["reports"]
    assert build.extra["placement"] == {"context": 0, "denoiser": 1}, "63 GB of weights each"
    assert {tower: len(report["parsed"]["inputs"]) > 400 for tower, report in reports.items()} == {
        "context": True,
        "denoiser": True,
    }
    assert sum(report["bytes"] for report in reports.values()) < 100e6
    check_listings(folder / "engines" / "rtx-pro-6000")


def check_listings(engines):
    """Nothing of the released model's is copied, and memory and bytes are what is said of them."""
    page = (ROOT / "docs" / "build.md").read_text(encoding="utf-8")
    for tower, dim, tokens in (("context", "tokens", 256), ("denoiser", "block", 64)):
        _, (listing,) = read_listings(engines / f"{tower}.traffic.json")
        planned = compiled_tower(config_of(), tower, "bodies", 2).scratch_bytes(16, tokens, 8448)
        assert 0.8 * planned < listing.scratch <= WORKSPACE_SLACK * planned
        assert f"{listing.scratch / 1e6:,.0f} MB of scratch" in page
        calls = [(rows, drawn) for drawn in (0, 1) for rows in (1, 4, 16)]
        for rows, drawn in calls if tower == "denoiser" else calls[:3]:
            lists = {**dict.fromkeys(ROW_LISTS.values(), 0), SAMPLED: rows * drawn}
            traffic = traffic_of(listing, {"batch": rows, dim: 16, **lists})
            assert not [one for one in traffic.copies if KEPT.search(one[1])]
            figures = [traffic.moved.total / 1e9, traffic.least / 1e9, traffic.ratio]
            said = " +".join(f"{one:.3f}" for one in figures)
            if tower == "denoiser":
                assert re.search(
                    rf"^ +{rows} +{rows * drawn} +8,448 +16 +{said} +669 +0 +0\.000$",
                    page,
                    re.MULTILINE,
                )
            else:
                assert f"{traffic.ratio:.3f}" in page
