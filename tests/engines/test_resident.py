"""The resident runtime on a device made of this machine's memory: the CPU flavour's answers."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twotower_engines.engine_set import BuildRecord, Limits
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.request import Request
from twotower_engines.resident.device import Device
from twotower_engines.resident.runtime import ResidentRuntime, Tower, bucket
from twotower_engines.resident.tensorrt_engine import check_build
from twotower_engines.resident.upload import upload_weights, weight_bytes
from twotower_engines.runtime import POLICIES, DenoiseRow, ExtendRow, open_runtime
from twotower_engines.scheduler import Scheduler
from twotower_engines.weights import WeightStore

LIMITS = Limits(slots=5, context=96, max_tokens_per_call=32, block_size_max=16)


def _load_host():
    path = Path(__file__).with_name("host_device.py")
    spec = importlib.util.spec_from_file_location("twotower_tests_host_device", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


host = _load_host()


def make_resident(engines, gpus=1):
    """The runtime as `loading.open_resident_runtime` makes it, with host engines."""
    store = WeightStore(engines.manifest)
    store.check()
    devices = [host.HostDevice(f"host:{index}") for index in range(gpus)]
    towers = []
    for name, device in (("context", devices[0]), ("denoiser", devices[-1])):
        engine = host.HostEngine(engines.plan_path(name), device)
        towers.append(Tower(engine, device, upload_weights(store, name, device, window=1 << 12)))
    return ResidentRuntime(engines.manifest, LIMITS, *towers)


@pytest.fixture(scope="module")
def engines(random_engines):
    return random_engines("MEM*E*M", seed=11)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-gpu", "two-gpus"])
def resident(engines, request):
    runtime = make_resident(engines.engines, request.param)
    yield runtime
    runtime.close()


def draw_request(number, generator):
    mode = generator.choice(["mask_diffusion", "mask_diffusion", "mock_ar", "ar"])
    return Request(
        request_id=str(number),
        prompt_ids=tuple(generator.randrange(4, 300) for _ in range(generator.randint(1, 50))),
        mode=mode,
        max_new_tokens=generator.randint(1, 30),
        block_size=generator.choice([4, 9, 16]),
        steps=generator.randint(1, 12),
        threshold=generator.uniform(0.05, 0.95),
        policy=generator.choice(list(POLICIES)),
        temperature=generator.choice([0.0, 0.8]),
        seed=generator.randrange(1 << 30),
    )


def answers(runtime, requests):
    scheduler = Scheduler(runtime)
    for request in requests:
        scheduler.submit(request)
    got = {request.request_id: [] for request in requests}
    while not scheduler.idle:
        for event in scheduler.turn():
            assert event.error is None
            got[event.request_id] += event.ids
    return got


def test_answers_are_those_of_the_cpu_flavour(engines, resident):
    generator = random.Random(1)
    requests = [draw_request(number, generator) for number in range(14)]
    assert answers(resident, requests) == answers(engines.runtime, requests)


def test_slots_are_clean_when_they_are_used_again(engines, resident):
    generator = random.Random(2)
    request = draw_request(0, generator)
    first = answers(resident, [request])
    answers(resident, [draw_request(number, generator) for number in range(1, 8)])
    assert answers(resident, [request]) == first


def test_a_call_leaves_the_slots_inside_its_window_alone(resident):
    ids = np.arange(5, 13, dtype=np.int32)
    block = np.full(8, resident.mask_token_id, np.int32)

    def refined():
        row = DenoiseRow(1, block, threshold=1.0, steps_left=1)
        return resident.denoise([row])[0].ids.tolist()

    for slot in range(4):
        resident.reset(slot)
    resident.extend([ExtendRow(1, ids)])
    before = refined()
    resident.extend([ExtendRow(0, ids[:3]), ExtendRow(2, ids[:5])])
    assert resident.context_length(1) == 8
    assert refined() == before


def test_each_bucket_of_rows_is_captured_once(engines):
    runtime = make_resident(engines.engines)
    device = runtime._denoiser.device
    block = np.full(4, runtime.mask_token_id, np.int32)
    for slot in range(5):
        runtime.reset(slot)
        runtime.extend([ExtendRow(slot, np.array([7], np.int32))])
    for _ in range(2):
        for slot in range(5):
            runtime.denoise([DenoiseRow(slot, block, threshold=0.5, steps_left=2)])
    assert device.captures == len({bucket(slot + 1, 5) for slot in range(5)}) == 4
    runtime.close()


def test_calls_share_the_memory_of_what_nobody_reads_later(engines):
    runtime = make_resident(engines.engines)
    device = runtime._context.device
    block = np.full(16, runtime.mask_token_id, np.int32)
    for slot in range(5):
        runtime.reset(slot)
    runtime.extend([ExtendRow(slot, np.arange(5, 37, dtype=np.int32)) for slot in range(5)])
    runtime.denoise([DenoiseRow(4, block, threshold=0.5, steps_left=2)])
    before = device.room
    runtime.extend([ExtendRow(0, block[:1]), ExtendRow(1, block[:1])])
    runtime.denoise([DenoiseRow(0, block[:9], threshold=0.5, steps_left=2)])
    logits_of_the_second = 9 * 300 * 4
    assert before - device.room < logits_of_the_second
    runtime.close()


@pytest.mark.parametrize("window", [4096, 1 << 20])
def test_upload_in_windows_keeps_every_byte(engines, window):
    store = WeightStore(engines.engines.manifest)
    device = host.HostDevice()
    seen = []
    addresses = upload_weights(
        store, "denoiser", device, lambda done, total: seen.append((done, total)), window
    )
    for name, weight in store.manifest.weights["denoiser"].items():
        there = host.view(addresses[name], weight_bytes(weight)).view(np.float32)
        np.testing.assert_array_equal(there.reshape(weight.shape), store.float32(weight))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_no_room_is_said_with_the_device(engines):
    store = WeightStore(engines.engines.manifest)
    with pytest.raises(RuntimeLoadError, match=r"host:0: no room"):
        upload_weights(store, "context", host.HostDevice(room=10_000))


def test_the_host_device_does_all_that_a_device_must():
    asked = {name for name in vars(Device) if not name.startswith("_")}
    assert asked <= set(dir(host.HostDevice()))


@pytest.mark.parametrize(
    ("compute_capability", "version", "message"),
    [
        ("9.0", "11.4.0", r"built for `l40s` .compute capability 8.9.*has 9.0"),
        ("8.9", "10.13.2", r"built with tensorrt 11.4.0, but 10.13.2"),
    ],
)
def test_a_plan_for_another_machine_is_refused_by_name(compute_capability, version, message):
    build = BuildRecord(
        sku="l40s",
        flavour="tensorrt",
        precision="bf16",
        limits=LIMITS,
        plans={},
        compute_capability="8.9",
        versions={"tensorrt": "11.4.0"},
    )
    check_build(build, "11.4.1", "cuda:0", "8.9")
    with pytest.raises(RuntimeLoadError, match=message):
        check_build(build, version, "cuda:0", compute_capability)


@pytest.mark.parametrize(
    ("flavour", "message"),
    [
        ("tensorrt", "`tensorrt` need the package tensorrt, which is not installed"),
        ("openvino", "`openvino` are not known to this version"),
    ],
)
def test_engines_that_nothing_here_can_run_are_refused(engines, flavour, message):
    build = replace(engines.engines.build, flavour=flavour)
    with pytest.raises(RuntimeLoadError, match=message):
        open_runtime(replace(engines.engines, build=build))


def test_every_cuda_call_exists_in_nvidias_bindings():
    """The bindings import without a driver; what we call must be there, with a GPU or without."""
    bindings = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    source = Path(sys.modules["twotower_engines.resident.device"].__file__).with_name(
        "cuda_device.py"
    )

    called = set(re.findall(r"\b(cuda[A-Z]\w+)", source.read_text(encoding="utf-8")))
    members = {"cudaMemcpyDefault", "cudaStreamCaptureModeThreadLocal"}
    members |= {"cudaErrorPeerAccessAlreadyEnabled"}
    assert len(called) > 25
    for name in called - members:
        assert hasattr(bindings, name), name
    assert bindings.cudaMemcpyKind.cudaMemcpyDefault
    assert bindings.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal is not None
    assert bindings.cudaError_t.cudaErrorPeerAccessAlreadyEnabled


def test_without_a_gpu_the_device_says_so():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    from twotower_engines.resident.cuda_device import CudaDevice

    with pytest.raises(RuntimeLoadError, match=r"cuda:63: this machine has .* usable GPUs"):
        CudaDevice(63)
