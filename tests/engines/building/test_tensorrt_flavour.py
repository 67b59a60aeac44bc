"""TensorRT proper: what can be seen without a GPU, and, on one, that it builds.

Parsing, profiles, the worker process and its failures are the same code as TensorRT-RTX's and are
tested there with the real library. Where a GPU is said to be present below, its name is made up:
nothing is built then.
"""

from __future__ import annotations

import json
import platform
from dataclasses import replace

import onnx
import pytest

from tests.support.engine_bundles import write_bundle_of
from twotower_contract.engine_set import Limits
from twotower_contract.manifest import read_manifest
from twotower_contract.skus import GIB, known_skus
from twotower_contract.traffic import traffic_of
from twotower_engines.building import build as build_module
from twotower_engines.building.build import FLAVOURS, BuildOptions, build_engines
from twotower_engines.building.flavours import tensorrt as module
from twotower_engines.building.flavours.compiled import signature_of
from twotower_engines.building.flavours.flavour import Needs, Order, Target
from twotower_engines.building.flavours.jobs import engine_job, engine_recipe
from twotower_engines.building.flavours.library_build import (
    RefusedError,
    _configure,
    _described,
    _inspected,
    _open,
)
from twotower_engines.building.flavours.profiles import narrow_profiles, wide_profiles
from twotower_engines.building.flavours.tensorrt import TensorRtFlavour
from twotower_engines.errors import BuildError, PlanError
from twotower_engines.planning.local_gpu import LocalGpu
from twotower_engines.planning.plan import plan_memory
from twotower_engines.planning.sku_lookup import find_sku

LIMITS = Limits(slots=16, context=8192, max_tokens_per_call=256, block_size_max=64)
SHARED_9_0 = ("h100-sxm", "h100-pcie", "h100-nvl", "h200")
ARM = ("gh200", "gb200", "dgx-spark")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle_of(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture
def present(monkeypatch):
    """Make the machine believe that it has a GPU of the table, or none, and the CPU beside it."""

    def pretend(name, arch=None):
        sku = None if name is None else find_sku(name)
        machine(monkeypatch, arch or (sku.arch if sku else "x86_64"))
        gpu = sku and LocalGpu(sku.device_names[0], sku.memory, sku.compute_capability)
        monkeypatch.setattr(module, "local_gpu", lambda: gpu)

    return pretend


def machine(monkeypatch, arch):
    monkeypatch.setattr(platform, "machine", lambda: arch)


def target(name, limits=LIMITS, is_shared=False):
    return Target(find_sku(name), limits, "bf16", is_shared)


@pytest.mark.parametrize("sku", [one for one in known_skus() if one != "cpu"])
def test_without_a_gpu_it_says_what_to_run_where(present, sku):
    present(None, find_sku(sku).arch)
    with pytest.raises(BuildError, match="no NVIDIA GPU was found here") as refused:
        TensorRtFlavour().check(target(sku))
    text = str(refused.value)
    assert f"`twotower build BUNDLE --sku {sku} ENGINES`" in text
    assert find_sku(sku).title in text
    assert ("--flavour tensorrt-rtx" in text) == ("tensorrt-rtx" in find_sku(sku).flavours)


def test_the_refusal_comes_before_anything_is_written(bundle, tmp_path, present):
    present(None)
    with pytest.raises(BuildError, match="tuned on the GPU itself"):
        build_engines(bundle, tmp_path / "engines", BuildOptions(find_sku("h200")))
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("here", SHARED_9_0)
def test_gpus_of_one_compute_capability_build_for_each_other(present, here):
    present(here)
    for sku in SHARED_9_0:
        TensorRtFlavour().check(target(sku, is_shared=True))
        if sku == here:
            TensorRtFlavour().check(target(sku))
            continue
        with pytest.raises(BuildError, match=f"with {find_sku(sku).title} and.* --same-capability"):
            TensorRtFlavour().check(target(sku))


@pytest.mark.parametrize("sku", ARM)
def test_another_cpu_is_refused_by_name(present, sku):
    """A plan of an x86-64 machine does not load on a Grace CPU, whatever the GPU."""
    present("h200")
    flavours = {"tensorrt": TensorRtFlavour()}
    if "tensorrt-rtx" in find_sku(sku).flavours:
        flavours["tensorrt-rtx"] = FLAVOURS["tensorrt-rtx"]
    for flavour in flavours.values():
        with pytest.raises(
            BuildError, match=f"engines for {sku} must be built on aarch64.*this machine is x86_64"
        ):
            flavour.check(target(sku))


def test_the_same_gpu_on_another_cpu_is_another_plan(present, monkeypatch):
    present("h200")
    x86 = TensorRtFlavour().recipe("denoiser", target("h200"))
    assert FLAVOURS["tensorrt"].needs(target("h200")).machine == x86["machine"] == "x86_64"
    assert FLAVOURS["onnxruntime"].needs(target("cpu")) == Needs()
    present("h200", "aarch64")
    arm = TensorRtFlavour().recipe("denoiser", replace_arch(target("h200"), "aarch64"))
    assert FLAVOURS["tensorrt-rtx"].needs(target("l40s")) == Needs("aarch64")
    assert (arm["machine"], x86["built_for"]) == ("aarch64", "h200")


def replace_arch(wanted, arch):
    return replace(wanted, sku=replace(wanted.sku, arch=arch))


def file_sku(**changes):
    """As a SKU file gives it: in no table, and without device names."""
    return replace(find_sku("a10"), name="mine", title="mine", device_names=(), **changes)


def test_a_sku_file_is_compared_with_what_the_driver_reports(monkeypatch):
    machine(monkeypatch, "x86_64")
    gpu = LocalGpu("RTX A6000", 48 * GIB, "8.6")
    monkeypatch.setattr(module, "local_gpu", lambda: gpu)
    mine = replace(target("a10"), sku=file_sku(compute_capability="8.7", memory=47 * GIB))
    monkeypatch.setattr(module, "local_gpu", lambda: replace(gpu, compute_capability="8.7"))
    TensorRtFlavour().check(mine)
    with pytest.raises(BuildError, match=r"this machine's NVIDIA RTX A6000 .*8\.7, 48 GiB"):
        TensorRtFlavour().check(replace(mine, sku=replace(mine.sku, memory=22 * GIB)))
    monkeypatch.setattr(module, "local_gpu", lambda: gpu)
    with pytest.raises(BuildError, match=r"mine \(compute capability 8\.7\) cannot be"):
        TensorRtFlavour().check(mine)


def test_an_unknown_card_builds_for_its_relatives(monkeypatch):
    machine(monkeypatch, "x86_64")
    monkeypatch.setattr(module, "local_gpu", lambda: LocalGpu("H200 NVL", 140 * GIB, "9.0"))
    TensorRtFlavour().check(target("h200", is_shared=True))


@pytest.mark.parametrize(("here", "sku"), [("h100-sxm", "b200"), ("a10", "l4"), ("b300", "b200")])
def test_another_gpu_is_refused_by_name(present, here, sku):
    present(here)
    name = find_sku(here).device_names[0]
    with pytest.raises(BuildError, match=f"engines for {sku} .*this machine's NVIDIA {name}"):
        TensorRtFlavour().check(target(sku))


def test_one_plan_serves_the_gpus_of_a_compute_capability():
    recipes = [
        TensorRtFlavour().recipe("denoiser", target(sku, is_shared=True)) for sku in SHARED_9_0
    ]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert recipes[0]["hardware"] == "SAME_COMPUTE_CAPABILITY"
    assert recipes[0]["built_for"] == "9.0"


@pytest.mark.parametrize("sku", ["a10", "gh200", "b200", "h200"])
def test_a_gpu_gets_a_plan_of_its_own_unless_told_otherwise(sku):
    recipe = TensorRtFlavour().recipe("denoiser", target(sku))
    assert (recipe["hardware"], recipe["built_for"]) == (None, sku)


def test_the_kernels_are_part_of_the_recipe(monkeypatch):
    flavour = TensorRtFlavour()
    with_kernels, needs = flavour.recipe("denoiser", target("h200")), flavour.needs(target("b200"))
    monkeypatch.setattr(TensorRtFlavour, "has_kernels", lambda self: False)
    without = flavour.recipe("denoiser", target("h200"))
    assert with_kernels["kernels"] == "9.0"
    assert len(with_kernels["kernels_sha256"]) == 64
    assert needs.cuda == "12.7", "of the PTX that the plan carries"
    assert without["kernels"] is without["kernels_sha256"] is None
    assert flavour.needs(target("b200")).cuda is None
    monkeypatch.setattr(module, "installed", lambda packages: "11.4.0.106")
    assert flavour.versions() == {"tensorrt": "11.4.0.106"}


def test_without_kernels_more_memory_is_planned(bundle, tmp_path, monkeypatch, present):
    """What reaches the planner: the build is refused only after its plan was made."""
    present("h200")
    plans = []

    def record(model, request):
        plans.append(request.kernels)
        return plan_memory(model, request)

    monkeypatch.setattr(build_module, "plan_memory", record)
    monkeypatch.setattr(module, "installed", lambda packages: None)
    for has in (True, False):
        monkeypatch.setattr(TensorRtFlavour, "has_kernels", lambda self, has=has: has)
        with pytest.raises(BuildError, match="TensorRT is not installed"):
            build_engines(bundle, tmp_path, BuildOptions(find_sku("h200"), 2, 64))
    assert plans == [True, False]


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_the_builder_may_take_what_the_device_has(flavour):
    """A region of the compiler needs all its intermediates at once, or the build is refused."""
    for tower in ("context", "denoiser"):
        recipe = FLAVOURS[flavour].recipe(tower, target("rtx-pro-6000"))
        job = {**recipe, "flags": {}, "compute_capabilities": []}
        config = RecordingConfig()
        _configure(RecordingApi, config, job)
        assert config.told == []


def test_no_tensorrt(monkeypatch):
    monkeypatch.setattr(module, "installed", lambda packages: None)
    with pytest.raises(BuildError, match=r"TensorRT is not installed; .*twotower\[tensorrt\]"):
        TensorRtFlavour().versions()


@pytest.mark.parametrize(
    ("sku", "here", "package", "kernels", "chosen"),
    [
        ("rtx-pro-6000", "rtx-pro-6000", "11.4.0.106", True, "tensorrt"),
        ("rtx-pro-6000", None, "11.4.0.106", True, "tensorrt-rtx"),
        ("rtx-pro-6000", "rtx-5090", "11.4.0.106", True, "tensorrt-rtx"),
        ("rtx-pro-6000", "rtx-pro-6000", None, True, "tensorrt-rtx"),
        ("rtx-pro-6000", "rtx-pro-6000", "11.4.0.106", False, "tensorrt-rtx"),
        ("l40s", None, "11.4.0.106", True, "tensorrt"),
        ("h200", "h200", None, True, "tensorrt"),
    ],
)
def test_auto_takes_what_can_be_built_here(
    bundle, tmp_path, monkeypatch, present, sku, here, package, kernels, chosen
):
    """On an RTX card TensorRT with our kernels; what else must be refused is refused by name."""
    present(here)
    monkeypatch.setattr(module, "installed", lambda packages: package)
    monkeypatch.setattr(TensorRtFlavour, "has_kernels", lambda self: kernels)
    asked = []

    def record(model, request):
        asked.append((request.flavour, request.kernels))
        raise PlanError("far enough")

    monkeypatch.setattr(build_module, "plan_memory", record)
    with pytest.raises(PlanError, match="far enough"):
        build_engines(bundle, tmp_path, BuildOptions(find_sku(sku), 2, 64))
    assert asked == [(chosen, kernels and chosen == "tensorrt")]


@pytest.mark.parametrize(("version", "fits"), [
    ("10.14.1.48", False), ("10.15.1.29", True), ("11.4.0.106", True), ("12.0.0", False),
])  # fmt: skip
def test_which_versions_of_tensorrt_fit(monkeypatch, version, fits):
    monkeypatch.setattr(module, "installed", lambda packages: version)
    if fits:
        assert TensorRtFlavour().versions()["tensorrt"] == version
    else:
        with pytest.raises(BuildError, match=r"10\.15 to 11\.x is needed"):
            TensorRtFlavour().versions()


def takes(profile, **sizes):
    return all(profile.sizes[dim].least <= n <= profile.sizes[dim].most for dim, n in sizes.items())


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize(("sku", "is_folded"), [("a100-80", True), ("h100-sxm", False)])
def test_caches_are_copied_once_where_they_are_copied(
    bundle, tmp_path, monkeypatch, sku, is_folded, has_kernels
):
    """Of the graph as it is exported an A100's engine would copy a cache for each query head."""
    monkeypatch.setattr(TensorRtFlavour, "has_kernels", lambda self: has_kernels)
    recipe = TensorRtFlavour().recipe("denoiser", target(sku))
    exported = bundle / read_manifest(bundle).graph("native", "denoiser").file
    job = engine_job(Order(exported, tmp_path / "denoiser.plan", recipe))
    (before,), (after,) = (attention_of(onnx.load(path)) for path in (exported, job["graph"]))
    assert (before.input[0] != after.input[0]) == is_folded


def attention_of(model):
    bodies = (one.node for one in model.functions)
    return [node for nodes in bodies for node in nodes if node.op_type == "Attention"]


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 16, 17, 64, 100, 256])
def test_every_call_has_a_profile(slots):
    limits = Limits(slots, 4096, 256, 64)
    for make in (narrow_profiles, wide_profiles):
        for batch in range(1, slots + 1):
            for tokens in (1, 16, 64, 256):
                assert any(
                    takes(one, batch=batch, tokens=tokens, context=4096 + 256)
                    for one in make("context", limits)
                )
            for block in (1, 16, 64):
                found = [
                    one
                    for one in make("denoiser", limits)
                    if takes(one, batch=batch, block=block, context=4096 + 256)
                ]
                assert len(found) == 1


def test_the_first_profile_that_fits_is_the_narrow_one():
    names = []
    for tokens in (1, 16, 64, 65, 256):
        profiles = narrow_profiles("context", LIMITS)
        names.append(next(one.name for one in profiles if takes(one, batch=2, tokens=tokens)))
    assert names == ["token", "block", "block", "chunk", "chunk"]


def test_blocks_as_long_as_a_chunk_are_a_profile_still():
    for make in (narrow_profiles, wide_profiles):
        make("context", Limits(1, 1, 32, 64))
        make("denoiser", Limits(1, 1, 32, 1))


class RecordingApi:
    """Stands in for TensorRT's API, to see what it is told: the real one wants a GPU here."""

    class BuilderFlag:
        REFIT = "refit"
        TF32 = "tf32"

    class ProfilingVerbosity:
        DETAILED = "detailed"

    class HardwareCompatibilityLevel:
        SAME_COMPUTE_CAPABILITY = "same"

    class ComputeCapability:
        SM89 = "sm89"
        SM120 = "sm120"


class RecordingConfig:
    """Refuses the timing cache of another machine, as TensorRT does."""

    def __init__(self):
        self.told = []
        self.hardware_compatibility_level = None

    def set_flag(self, flag):
        self.told.append(flag)

    def clear_flag(self, flag):
        self.told.append(f"no {flag}")

    def set_memory_pool_limit(self, pool, size):
        self.told.append((pool, size))  # nobody should

    def set_compute_capability(self, capability, index):
        self.told.append((capability, index))

    def create_timing_cache(self, content):
        return None if content == b"of another GPU" else content

    def set_timing_cache(self, cache, ignore_mismatch):
        self.told.append((cache, ignore_mismatch))
        return True


def configured(**job):
    config = RecordingConfig()
    _configure(RecordingApi, config, {"flags": {}, "verbosity": "DETAILED", **job})
    return config


def test_what_the_builder_is_told(tmp_path):
    assert configured(flags={"REFIT": True, "TF32": False}).told == ["refit", "no tf32"]
    assert configured().profiling_verbosity == "detailed"
    assert configured(hardware=None).hardware_compatibility_level is None
    level = configured(hardware="SAME_COMPUTE_CAPABILITY").hardware_compatibility_level
    assert level == "same"
    aimed = configured(compute_capabilities=["8.9", "12.0"])
    assert aimed.num_compute_capabilities == 2
    assert aimed.told == [("sm89", 0), ("sm120", 1)]


def test_a_timing_cache_is_used_and_one_of_another_gpu_is_not(tmp_path):
    path = tmp_path / "timing"
    assert configured(timing_cache=str(path)).told == [(b"", False)]
    path.write_bytes(b"of this GPU")
    assert configured(timing_cache=str(path)).told == [(b"of this GPU", False)]
    path.write_bytes(b"of another GPU")
    assert configured(timing_cache=str(path)).told == [(b"", False)]


def test_both_towers_share_the_timing_cache_of_this_gpu(bundle, tmp_path, monkeypatch, present):
    """What the flavour hands to its workers; none is started here."""
    jobs = {}

    def record(library, given, at_once, progress):
        jobs.update(given, library=library, at_once=at_once)
        numbers = ("bytes", "scratch", "peak_rss", "cpu_seconds", "waited_seconds")
        figures = dict.fromkeys(numbers, 0)
        figures |= {"parsed": {}, "flags": [], "engine": None, "versions": {}}
        return dict.fromkeys(given, figures)

    monkeypatch.setattr(module, "installed", lambda packages: "11.4.0.106")
    monkeypatch.setattr(module, "build_engine_files", record)
    present("h100-sxm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flavour = TensorRtFlavour()
    orders = {
        tower: Order(
            bundle / read_manifest(bundle).graph("native", tower).file,
            tmp_path / f"{tower}.plan",
            flavour.recipe(tower, target("h200")),
        )
        for tower in ("context", "denoiser")
    }
    flavour.build(orders, target("h200"), lambda tower, text: None)
    expected = str(tmp_path / "twotower" / "timing" / "h100-80gb-hbm3-11.4.0.106.cache")
    assert [jobs[tower]["timing_cache"] for tower in orders] == [expected, expected]
    assert jobs["context"]["layers"] == str(tmp_path / "context.layers.json")
    assert jobs["at_once"] == 1, "two builds at once would disturb each other's timings"
    assert jobs["library"].module == "tensorrt"
    assert len(jobs["context"]["profiles"]) == 3
    assert jobs["context"]["profiles"][0]["ids"] == ([1, 1], [4, 1], [16, 1])


class InspectingApi:
    """Stands in for a TensorRT that can open plans; the real one needs a GPU for it.

    Its inspector says sizes and types only where it has a context with shapes, as NVIDIA's does.
    """

    class LayerInformationFormat:
        JSON = "json"

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, plan):
            return InspectedEngine() if plan else None


class InspectedEngine:
    device_memory_size_v2 = 12345

    def create_engine_inspector(self):
        return Inspector()

    def create_execution_context(self, strategy):
        assert strategy == "user managed", "a context that only describes gets no memory"
        return InspectedContext()

    def get_device_memory_size_for_profile_v2(self, profile):
        return (1000, 12345)[profile]


class InspectedContext:
    def __init__(self):
        self.profile, self.shapes = 0, {}

    def set_optimization_profile_async(self, profile, stream):
        self.profile = profile

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape


class Inspector:
    execution_context = None

    def get_engine_information(self, form):
        context = self.execution_context
        rows, tokens = (-1, -1) if context is None else context.shapes["ids"]
        kind = "N/A due to dynamic shapes" if context is None else "Row major linear BFloat16"

        def tensor(name, *dims):
            return {"Name": name, "Dimensions": list(dims), "Format/Datatype": kind}

        def layer(kind, reads, writes, metadata=""):
            values = {"Name": kind, "LayerType": kind, "Metadata": metadata}
            return values | {"Inputs": reads, "Outputs": writes}

        weight = tensor("context_tower.layers.0.mixer.in_proj.weight", 10304, 2688)
        hidden, projected = (tensor(n, rows * tokens, s) for n, s in (("h", 2688), ("p", 10304)))
        of = "[ONNX Layer: in_proj.gemm | context.layers.0 (ContextMambaLayer)]"
        layers = [
            layer("gemm", [weight, hidden], [projected], of),
            layer("kgen", [projected], [hidden]),
            layer("gemm", [hidden], [projected]),
            layer("signal", [], []),
        ]
        return json.dumps({"Layers": layers, "Bindings": []})


class Log:
    def text(self):
        return "no driver"


def test_what_an_opened_engine_tells(tmp_path):
    path = tmp_path / "context.layers.json"
    found = _described(InspectingApi, _open(InspectingApi, Log(), b"plan"), path)
    types = {"gemm": 2, "kgen": 1, "signal": 1}
    assert found == {"layers": 4, "types": types, "device_memory": 12345}
    assert len(json.loads(path.read_text())["Layers"]) == 4
    with pytest.raises(RefusedError, match="cannot be opened: no driver"):
        _open(InspectingApi, Log(), b"")


def test_the_kernels_of_each_profile_of_an_opened_engine(bundle, tmp_path):
    """Simulated: no TensorRT engine was opened on a GPU yet."""
    graph = bundle / read_manifest(bundle).graph("native", "context").file
    profiles = narrow_profiles("context", LIMITS)[1:]
    job = engine_job(Order(graph, tmp_path / "context.plan", engine_recipe(profiles)))
    signature = signature_of(onnx.load(graph))
    listings = _inspected(InspectingApi, InspectedEngine(), job, signature)
    assert [(one.profile, one.scratch) for one in listings] == [("block", 1000), ("chunk", 12345)]
    assert [one.usual["tokens"] for one in listings] == [16, 256]
    for listing, tokens in zip(listings, (4 * 16, 256), strict=True):
        traffic = traffic_of(listing)
        assert not listing.unsized
        assert {kind: one.kernels for kind, one in traffic.by_kind("M").items()} == {
            "M": 1,
            "ends": 2,
        }
        narrow, wide = 2 * tokens * 2688, 2 * tokens * 10304
        weight = 2 * 2688 * 10304
        assert (traffic.moved.read, traffic.moved.written) == (
            weight + 2 * narrow + wide,
            narrow + 2 * wide,
        )


def test_a_recipe_keeps_float32_and_nan_and_names_the_cpu():
    recipe = engine_recipe(wide_profiles("context", LIMITS))
    assert recipe["flags"] == {"TF32": False, "STRICT_NANS": True}
    assert (recipe["verbosity"], recipe["machine"]) == ("DETAILED", platform.machine())


def test_what_the_loader_is_told():
    assert FLAVOURS["tensorrt"].loader(target("h200")) == {"compute_capabilities": ["9.0"]}


@pytest.mark.gpu
def test_engines_on_this_machines_gpu(bundle, tmp_path, monkeypatch):
    """Cold, from the timing cache, and from the build cache."""
    pytest.importorskip("tensorrt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = BuildOptions(find_sku("local"), slots=2, context=64, flavour="tensorrt")
    made, is_new = build_engines(bundle, tmp_path / "engines", options)
    assert is_new
    assert made.build.flavour == "tensorrt"
    assert {len(profiles) for profiles in made.build.profiles.values()} == {2, 3}
    assert list((tmp_path / "cache" / "twotower" / "timing").glob("*.cache"))
    for tower, plan in made.build.plans.items():
        engine = made.build.extra["reports"][tower]["engine"]
        assert 0 < engine["device_memory"] <= made.build.memory["per_gpu"][0]["workspace"][tower]
        layers = json.loads((made.folder / plan.file).with_suffix(".layers.json").read_text())
        assert len(layers["Layers"]) == engine["layers"] > 0
    _, is_new = build_engines(bundle, tmp_path / "engines", options)
    assert not is_new


@pytest.mark.gpu
def test_a_plan_of_this_machines_gpu_is_loaded_by_it(bundle, tmp_path, monkeypatch):
    trt = pytest.importorskip("tensorrt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = BuildOptions(find_sku("local"), slots=2, context=64, flavour="tensorrt")
    made, _ = build_engines(bundle, tmp_path / "engines", options)
    runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
    engine = runtime.deserialize_cuda_engine(made.engine_path("denoiser").read_bytes())
    assert engine.num_optimization_profiles == len(made.build.profiles["denoiser"])
