"""CUDA's side of a device, against a fake of NVIDIA's bindings (see cuda_fake.py): no GPU runs."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tests.support.cuda_fake as fakes
import tests.support.host_device as host

pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")

from twotower_contract.engine_set import Limits
from twotower_contract.errors import TwoTowerError
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import ExtendRow
from twotower_engines.runtime.resident import cuda_device
from twotower_engines.runtime.resident.cuda_device import CudaDevice, CudaError, enable_peer_access
from twotower_engines.runtime.resident.device import Box
from twotower_engines.runtime.resident.runtime import ResidentRuntime, Tower
from twotower_engines.runtime.resident.upload import upload_weights

LIMITS = Limits(slots=5, context=96, max_tokens_per_call=32, block_size_max=16)
FULL_SIZE = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


@pytest.fixture
def fake(monkeypatch):
    return fakes.install(monkeypatch)


@pytest.fixture
def two(monkeypatch):
    return fakes.install(monkeypatch, gpus=2)


def test_every_cuda_call_exists_in_nvidias_bindings():
    """The bindings import without a driver; what we call must be there, with a GPU or without."""
    from cuda.bindings import runtime as bindings

    source = Path(cuda_device.__file__).read_text(encoding="utf-8")
    called = set(re.findall(r"\bcuda\.((?:make_)?cuda[A-Z]\w+)", source))
    called |= set(re.findall(r"_runtime\(\)\.(cuda[A-Z]\w+)", source))
    assert len(called) > 30
    for name in called:
        assert hasattr(bindings, name), name
    for enum, member in re.findall(r"\b(cuda(?:Error_t|Memcpy\w*|Stream\w*))\.(cuda\w+)", source):
        assert hasattr(getattr(bindings, enum), member), member


def test_without_a_gpu_the_device_says_so():
    with pytest.raises(RuntimeLoadError, match=r"no NVIDIA driver|cuda:63: this machine has"):
        CudaDevice(63)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 1}, "cuda:1: this machine has 1 usable GPUs"),
        ({"gpus": 0}, "cuda:1: this machine has 0 usable GPUs"),
        ({"driver": 12040}, r"driver serves CUDA 12.4, but cuda-python is for CUDA 13.4"),
        ({"driver": 0}, "has no NVIDIA driver"),
    ],
)
def test_a_device_that_is_not_there_is_refused_for_its_reason(monkeypatch, options, message):
    fake = fakes.install(monkeypatch, **options)
    with pytest.raises(RuntimeLoadError, match=message):
        CudaDevice(1)
    assert int(fake.last_error) == 0


def test_a_failed_call_is_an_error_that_a_user_sees_without_a_traceback(fake):
    device = CudaDevice()
    fake.cudaStreamSynchronize = lambda stream: fake.failed(
        fake.cudaError_t.cudaErrorECCUncorrectable
    )[:1]
    with pytest.raises(CudaError, match="cudaErrorECCUncorrectable: "):
        device.synchronize()
    assert issubclass(CudaError, TwoTowerError)
    assert CudaError.exit_code == 1


def test_no_room_leaves_no_error_behind(fake):
    device = CudaDevice()
    with pytest.raises(RuntimeLoadError, match=r"cuda:0 .*: no room for 1\.00 GB, 0\.27 GB"):
        device.allocate(10**9)
    assert int(fake.last_error) == 0, "TensorRT would take it for its own"


def test_boxes_are_copied_layer_by_layer(two):
    """3 layers of 4 rows of 8 bytes into 3 layers of 6 rows of 16: the middle of each."""
    one, other = CudaDevice(0), CudaDevice(1)
    sent = np.arange(96, dtype=np.uint8)
    for target_device in (one, other):
        source, target = one.allocate(96), target_device.allocate(288)
        one.upload(source, sent)
        target_device.zero(target, 288, 288, 1)
        one.follow(target_device)
        end = Box(target, 16, 6).moved(2 * 16 + 3)
        one.copy_box(end, Box(source, 8, 4).moved(8), 5, 2, 3, target_device)
        target_device.follow(one)
        back = np.empty(288, np.uint8)
        target_device.download(back, target)
        expected = np.zeros((3, 6, 16), np.uint8)
        expected[:, 2:4, 3:8] = sent.reshape(3, 4, 8)[:, 1:3, :5]
        np.testing.assert_array_equal(back.reshape(3, 6, 16), expected)
    assert Counter(two.calls)["cudaMemcpy3DPeerAsync"] == 1


def test_a_captured_call_repeats_with_new_input(fake):
    device = CudaDevice()
    source, target = device.allocate(256), device.allocate(256)
    device.upload(source, np.zeros(256, np.uint8))
    box = Box(source, 256, 1)
    launch = device.capture(lambda: device.copy_box(Box(target, 256, 1), box, 256, 1, 1, device))
    for number in (3, 4):
        sent = np.full(256, number, np.uint8)
        device.upload(source, sent)
        launch()
        back = np.empty(256, np.uint8)
        device.download(back, target)
        assert (back == number).all()
    device.close()
    assert fake.left() == 0


def test_what_fails_inside_a_capture_is_what_is_raised(fake):
    device = CudaDevice()
    runs = []

    def work():
        runs.append(1)
        if len(runs) == 2:
            fake.cudaStreamSynchronize(device.stream)  # spoils the capture
            raise RuntimeLoadError("the engine cannot")

    with pytest.raises(RuntimeLoadError, match="the engine cannot"):
        device.capture(work)
    assert int(fake.last_error) == 0
    device.synchronize()  # the stream is no longer capturing
    device.close()
    assert fake.left() == 0


def test_closing_frees_everything_once(fake):
    device = CudaDevice()
    device.allocate(1000)
    device.staging(1000)
    device.free_staging(device.staging(10))
    device.capture(lambda: None)
    device.fence().wait()
    device.close()
    assert fake.left() == 0
    calls = len(fake.calls)
    device.close()
    assert len(fake.calls) == calls


@pytest.mark.parametrize("peers", [True, False])
def test_peers_are_enabled_both_ways_and_leave_no_error(monkeypatch, peers):
    fake = fakes.install(monkeypatch, gpus=2, peers=peers)
    devices = CudaDevice(0), CudaDevice(1)
    for _ in range(2):  # the second time they are enabled already
        assert enable_peer_access(*devices) is peers
        assert int(fake.last_error) == 0
    assert fake.enabled_peers == ({(0, 1), (1, 0)} if peers else set())


class NullEngine:
    """Takes any call and computes nothing."""

    inputs = outputs = ()

    def prepare(self, shapes):
        return self

    def bind(self, addresses):
        pass

    def can_capture(self):
        return True

    def enqueue(self):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(("gpus", "most"), [(1, 8), (2, 32)])
def test_an_extension_of_all_layers_takes_few_calls(random_engines, monkeypatch, gpus, most):
    """16 rows of the full-size pattern: 929 copies on one GPU before, 1857 on two."""
    manifest = random_engines("MEM*E*M", seed=11).engines.manifest
    manifest = replace(manifest, model=replace(manifest.model, pattern=FULL_SIZE))
    fake = fakes.install(monkeypatch, gpus=gpus)
    devices = [CudaDevice(index) for index in range(gpus)]
    limits = Limits(slots=16, context=64, max_tokens_per_call=32, block_size_max=16)
    towers = [Tower(NullEngine(), device, {}) for device in (devices[0], devices[-1])]
    runtime = ResidentRuntime(manifest, limits, *towers)
    rows = [ExtendRow(slot, np.arange(16, dtype=np.int32)) for slot in range(16)]
    fake.calls.clear()
    runtime.extend(rows)
    counts = Counter(name for name in fake.calls if name != "cudaSetDevice")
    copies = counts["cudaMemcpy3DAsync"] + counts["cudaMemcpy3DPeerAsync"]
    assert copies == (2 if gpus == 1 else 2 + 18)
    assert counts["cudaMemcpy3DPeerAsync"] == 18 * (gpus - 1)
    asked = {name for name in counts if name.endswith("Async")}
    assert sum(counts[name] for name in asked) <= most
    fake.calls.clear()
    runtime.reset(3)
    assert Counter(fake.calls)["cudaMemset2DAsync"] == (5 if gpus == 1 else 3 + 5)
    runtime.close()


@pytest.mark.parametrize("gpus", [1, 2])
def test_answers_over_cuda_are_those_of_the_cpu_flavour(random_engines, monkeypatch, gpus):
    """Everything but the kernels: streams that run late, events, graphs, peer copies, uploads."""
    made = random_engines("MEM*E*M", seed=11)
    fake = fakes.install(monkeypatch, gpus=gpus, room=1 << 27)
    store = WeightStore(made.engines.manifest)
    devices = [CudaDevice(index) for index in range(gpus)]
    towers = []
    for name, device in (("context", devices[0]), ("denoiser", devices[-1])):

        def submit(work, device=device):
            device.use()
            fake.submit(device.stream, work)

        engine = host.HostEngine(
            made.engines.engine_path(name),
            device,
            lambda address, size, index=device.index: fake.check(index, address, size),
            submit,
        )
        towers.append(Tower(engine, device, upload_weights(store, name, device, window=1 << 16)))
    runtime = ResidentRuntime(made.engines.manifest, LIMITS, *towers)
    draw = random.Random(7)
    requests = [
        Request(
            str(number),
            tuple(draw.randrange(4, 300) for _ in range(draw.randint(1, 40))),
            mode=("mask_diffusion", "mock_ar", "ar")[number % 3],
            max_new_tokens=draw.randint(1, 20),
            block_size=draw.choice([4, 9, 16]),
            steps=4,
        )
        for number in range(7)
    ]

    def answers(of):
        scheduler, got = Scheduler(of), {}
        for request in requests:
            scheduler.submit(request)
        while not scheduler.idle:
            for event in scheduler.turn():
                assert event.error is None
                got.setdefault(event.request_id, []).extend(event.ids)
        return got

    assert answers(runtime) == answers(made.runtime)
    runtime.close()
    assert fake.left() == 0
