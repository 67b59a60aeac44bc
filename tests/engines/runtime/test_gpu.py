"""What only a GPU can show of the resident runtime: CUDA's side of a device, and real plans.

make test ARGS="-m gpu"
"""

from __future__ import annotations

import subprocess
import time

import numpy as np
import pytest

from tests.support import TWOTOWER

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    if not usable_gpus():
        pytest.skip("needs an NVIDIA GPU")
    from twotower_engines.runtime.resident.cuda_device import CudaDevice

    device = CudaDevice(0)
    yield device
    device.close()


def test_bytes_come_back_as_they_went(device):
    sent = np.random.default_rng(0).integers(0, 256, 1_000_003, np.uint8)
    address = device.allocate(sent.size)
    staged = device.staging(sent.size)
    staged[:] = sent
    device.upload(address, staged)
    back = np.empty_like(sent)
    device.download(back, address)
    np.testing.assert_array_equal(back, sent)


def usable_gpus():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    from twotower_engines.errors import RuntimeLoadError
    from twotower_engines.runtime.resident.cuda_device import usable_gpus

    try:
        return usable_gpus()
    except RuntimeLoadError:
        return 0


@pytest.fixture
def devices(device):
    if usable_gpus() < 2:
        pytest.skip("needs two GPUs in one machine")
    from twotower_engines.runtime.resident.cuda_device import CudaDevice, enable_peer_access

    second = CudaDevice(1)
    enable_peer_access(device, second)
    enable_peer_access(device, second)  # again: enabled already, and no error is left behind
    yield device, second
    second.close()


def copied_boxes(source_device, target_device):
    """3 layers of 4 rows of 24 bytes into 3 layers of 6 rows of 64; what came, what should."""
    from twotower_engines.runtime.resident.device import Box

    values = np.arange(288, dtype=np.uint8)
    source, target = source_device.allocate(288), target_device.allocate(3 * 6 * 64)
    source_device.upload(source, values)
    target_device.zero(target, 64, 64, 18)
    source_device.follow(target_device)
    end = Box(target, 64, 6).moved(2 * 64 + 8)
    source_device.copy_box(end, Box(source, 24, 4), 16, 3, 3, target_device)
    target_device.follow(source_device)
    back = np.empty((3, 6, 64), np.uint8)
    target_device.download(back, target)
    expected = np.zeros((3, 6, 64), np.uint8)
    expected[:, 2:5, 8:24] = values.reshape(3, 4, 24)[:, :3, :16]
    return back, expected


def test_boxes_reach_their_rows_only(device):
    np.testing.assert_array_equal(*copied_boxes(device, device))


def test_boxes_go_from_gpu_to_gpu(devices):
    first, second = devices
    np.testing.assert_array_equal(*copied_boxes(first, second))
    np.testing.assert_array_equal(*copied_boxes(second, first))


def test_a_captured_call_repeats_with_new_input(device):
    from twotower_engines.runtime.resident.device import Box

    source, target = (Box(device.allocate(256), 256, 1) for _ in range(2))
    device.upload(source.address, np.zeros(256, np.uint8))
    launch = device.capture(lambda: device.copy_box(target, source, 256, 1, 1, device))
    for number in (3, 4):
        device.upload(source.address, np.full(256, number, np.uint8))
        launch()
        back = np.empty(256, np.uint8)
        device.download(back, target.address)
        assert (back == number).all()


def test_what_fails_in_a_capture_is_raised_and_the_stream_goes_on(device):
    runs = []

    def work():
        runs.append(1)
        device.zero(address, 256, 256, 1)
        if len(runs) == 2:
            device.synchronize()  # not allowed while capturing

    from twotower_engines.runtime.resident.cuda_device import CudaError

    address = device.allocate(256)
    with pytest.raises(CudaError, match="cudaErrorStreamCaptureUnsupported"):
        device.capture(work)
    device.zero(address, 256, 256, 1)
    device.synchronize()


def test_no_room_is_said_in_gigabytes(device):
    from twotower_engines.errors import RuntimeLoadError

    with pytest.raises(RuntimeLoadError, match=r"no room for .* GB"):
        device.allocate(1 << 50)


MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@pytest.fixture(scope="module", params=MODULES)
def built(request, tmp_path_factory):
    """The trained tiny checkpoint, built for this machine's GPU and for its CPU."""
    module = MODULES[request.param]
    pytest.importorskip(module, reason=f"needs NVIDIA's {module}, from its own index")
    from twotower_engines.building.flavours.tensorrt_rtx import CAPABILITIES
    from twotower_engines.planning.local_gpu import local_sku

    if not usable_gpus():
        pytest.skip("needs an NVIDIA GPU")
    capability = local_sku().compute_capability
    if request.param == "tensorrt-rtx" and capability not in CAPABILITIES:
        pytest.skip(f"needs an RTX GPU ({', '.join(CAPABILITIES)}), this one is {capability}")
    folder = tmp_path_factory.mktemp("gpu")
    names = [str(folder / name) for name in ("checkpoint", "bundle", "engines")]
    checkpoint, bundle, engines = names
    for verb in (
        ["tiny", checkpoint, "--pretrained"],
        ["export", checkpoint, bundle],
        ["build", bundle, "--sku", "cpu", engines, "--slots", "4"],
        ["build", bundle, "--sku", "local", "--flavour", request.param, engines, "--slots", "4"],
    ):
        subprocess.run([*TWOTOWER, *verb], check=True)
    return folder / "engines"


def gpus_and_cpus(built):
    """The two engine sets, that for the GPU first."""
    from twotower_contract.engine_set import BUILD_FILE, open_engine_set

    found = [open_engine_set(path.parent) for path in built.glob(f"*/{BUILD_FILE}")]
    return sorted(found, key=lambda one: one.build.flavour == "onnxruntime")


def test_plans_answer_as_the_cpu_flavour_does(built):
    """bfloat16 against float32 on trained weights: near-ties may differ, answers as a whole not."""
    from twotower_engines.artifacts.tokenizer import Tokenizer
    from twotower_engines.generation.request import Request
    from twotower_engines.generation.scheduler import Scheduler
    from twotower_engines.runtime.opening import open_runtime

    prompt = "Mia the fox lived by the river. Mia had a red kite and loved it more than anything."
    answers = {}
    for engines in gpus_and_cpus(built):
        ids = Tokenizer(engines.folder).encode(prompt)
        runtime = open_runtime(engines)
        scheduler = Scheduler(runtime)
        for row in range(4):
            scheduler.submit(Request(str(row), ids, max_new_tokens=96, ignore_eos=True))
        got = {str(row): [] for row in range(4)}
        while not scheduler.idle:
            for event in scheduler.turn():
                assert event.error is None
                got[event.request_id] += event.ids
        assert len({tuple(ids) for ids in got.values()}) == 1  # batching changes nothing
        answers[engines.build.flavour] = got["0"]
        runtime.close()
    gpu, cpu = answers.values()
    assert np.equal(gpu, cpu).mean() > 0.95


def test_a_row_that_draws_changes_no_other(built):
    """Noise and entropy come through lists of rows, which are empty where no row asks for them."""
    from twotower_contract.policies import POLICIES
    from twotower_engines.runtime.interface import DenoiseRow, ExtendRow
    from twotower_engines.runtime.opening import open_runtime

    runtime = open_runtime(gpus_and_cpus(built)[0])
    for slot in range(2):
        runtime.reset(slot)
    runtime.extend([ExtendRow(slot, np.arange(5, 21, dtype=np.int32)) for slot in range(2)])
    block = np.full(16, runtime.mask_token_id, np.int32)
    unsure = POLICIES["entropy"]
    made = [
        runtime.denoise([DenoiseRow(0, block, 0.5, 1), DenoiseRow(1, block, 0.5, 1, *other)])
        for other in [(0.0, 0), (0.9, 0, 1), (0.0, unsure), (0.9, unsure, 1), (0.0, 0)]
    ]
    first, second = ([answer[row].ids.tolist() for answer in made] for row in range(2))
    assert first == [first[0]] * 5
    assert second[0] == second[2] == second[4] == first[0]
    assert second[1] == second[3] != first[0], "drawn, of the same seed"
    runtime.close()


def test_calls_that_are_prepared_take_seconds_and_memory(built, device, record_property):
    """The wall shows both, of all that opening does and of a call that is first needed later."""
    from twotower_engines.runtime.interface import ExtendRow
    from twotower_engines.runtime.opening import open_runtime

    engines, _ = gpus_and_cpus(built)
    flavour, ids = engines.build.flavour, np.arange(5, 21, dtype=np.int32)

    def measured(name, work):
        free, begun = device.free_memory(), time.perf_counter()
        result = work()
        seconds, taken = time.perf_counter() - begun, free - device.free_memory()
        record_property(f"{flavour}, {name}", f"{seconds:.3f} s, {taken / 1e6:.0f} MB")
        return result

    runtime = measured("opening", lambda: open_runtime(engines))
    last = runtime.limits.slots - 1  # a window that begins there is no usual one
    for name in ("first call from another slot", "the same again"):
        measured(name, lambda: runtime.extend([ExtendRow(last, ids)]))
    runtime.close()
    assert device.free_memory() > 0


def test_two_gpus_answer_as_one_does(built):
    if usable_gpus() < 2:
        pytest.skip("needs two GPUs in one machine")
    from dataclasses import replace

    from twotower_engines.generation.generator import Generator
    from twotower_engines.generation.request import Request

    def answer(engines, request):
        with Generator(engines) as generator:
            return generator.generate(request).output_ids

    engines = gpus_and_cpus(built)[0]
    extra = {**engines.build.extra, "placement": {"context": 0, "denoiser": 1}}
    apart = replace(engines, build=replace(engines.build, extra=extra, memory={}))
    for mode in ("mask_diffusion", "mock_ar"):
        request = Request("r", (5, 6, 7), mode=mode, max_new_tokens=48)
        assert answer(apart, request) == answer(engines, request)


def test_verify_finds_nothing_wrong(built):
    from twotower_engines.verify.engines import verify_engines

    engines, cpu = gpus_and_cpus(built)
    found = verify_engines(engines, against=cpu)
    assert found.passed, found.problems
    assert found.differences


def test_a_run_ends_well(built):
    engines, _ = gpus_and_cpus(built)
    command = [*TWOTOWER, "run", str(engines.folder)]
    done = subprocess.run(
        [*command, "--prompt", "Mia the fox", "--max-new-tokens", "16"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuda": "99.0"}, "for CUDA 99.0"),
        ({"machine": "riscv64"}, "riscv64"),
        ({"extra": {"compute_capabilities": ["5.0"]}}, "compute capability 5.0"),
        ({"extra": {"placement": {"context": 0, "denoiser": 63}}}, "placed on 64 GPUs"),
        ({"memory": {"per_gpu": [{"total": 1 << 60, "overhead": 0}]}}, "GB are free"),
    ],
    ids=["driver", "machine", "capability", "gpus", "memory"],
)
def test_what_does_not_fit_this_machine_is_refused(built, change, message):
    from dataclasses import replace

    from twotower_engines.errors import RuntimeLoadError
    from twotower_engines.runtime.opening import open_runtime

    engines, _ = gpus_and_cpus(built)
    if "extra" in change:
        change = {"extra": {**engines.build.extra, **change["extra"]}}
    wrong = replace(engines, build=replace(engines.build, **change))
    with pytest.raises(RuntimeLoadError, match=message):
        open_runtime(wrong)
