"""What only a GPU can show of the resident runtime: CUDA's side of a device, and real plans.

make test ARGS="-m gpu"
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture
def device():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    from twotower_engines.resident.cuda_device import CudaDevice

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


def test_strided_copies_reach_their_rows_only(device):
    rows, wide, narrow = 5, 64, 24
    source, target = device.allocate(rows * narrow), device.allocate(rows * wide)
    values = np.arange(rows * narrow, dtype=np.uint8)
    device.upload(source, values)
    device.zero(target, rows * wide)
    device.copy_strided(target + 8, wide, source, narrow, 16, rows)
    back = np.empty(rows * wide, np.uint8)
    device.download(back, target)
    expected = np.zeros((rows, wide), np.uint8)
    expected[:, 8:24] = values.reshape(rows, narrow)[:, :16]
    np.testing.assert_array_equal(back.reshape(rows, wide), expected)


def test_a_captured_call_repeats_with_new_input(device):
    source, target = device.allocate(256), device.allocate(256)
    device.upload(source, np.zeros(256, np.uint8))
    launch = device.capture(lambda: device.copy(target, source, 256))
    for number in (3, 4):
        device.upload(source, np.full(256, number, np.uint8))
        launch()
        back = np.empty(256, np.uint8)
        device.download(back, target)
        assert (back == number).all()


def test_no_room_is_said_in_gigabytes(device):
    from twotower_engines.errors import RuntimeLoadError

    with pytest.raises(RuntimeLoadError, match=r"no room for .* GB"):
        device.allocate(1 << 50)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The trained tiny checkpoint, built for this machine's GPU and for its CPU."""
    pytest.importorskip("tensorrt", reason="needs NVIDIA's tensorrt, from its own index")
    folder = tmp_path_factory.mktemp("gpu")
    names = [str(folder / name) for name in ("checkpoint", "bundle", "engines")]
    checkpoint, bundle, engines = names
    for verb in (
        ["tiny", checkpoint, "--pretrained"],
        ["export", checkpoint, bundle],
        ["build", bundle, "--sku", "cpu", engines, "--slots", "4"],
        ["build", bundle, "--sku", "local", "--flavour", "tensorrt", engines, "--slots", "4"],
    ):
        subprocess.run([sys.executable, "-m", "twotower_client.cli", *verb], check=True)
    return folder / "engines"


def test_plans_answer_as_the_cpu_flavour_does(built):
    """bfloat16 against float32 on trained weights: near-ties may differ, answers as a whole not."""
    from twotower_engines.engine_set import BUILD_FILE, open_engine_set
    from twotower_engines.request import Request
    from twotower_engines.runtime import open_runtime
    from twotower_engines.scheduler import Scheduler
    from twotower_engines.tokenizer import Tokenizer

    prompt = "Mia the fox lived by the river. Mia had a red kite and loved it more than anything."
    answers = {}
    for folder in sorted(path.parent for path in built.glob(f"*/{BUILD_FILE}")):
        engines = open_engine_set(folder)
        ids = Tokenizer(folder).encode(prompt)
        runtime = open_runtime(engines)
        scheduler = Scheduler(runtime)
        for row in range(4):
            scheduler.submit(Request(str(row), ids, max_new_tokens=96))
        got = {str(row): [] for row in range(4)}
        while not scheduler.idle:
            for event in scheduler.turn():
                assert event.error is None
                got[event.request_id] += event.ids
        assert len({tuple(ids) for ids in got.values()}) == 1  # batching changes nothing
        answers[engines.build.flavour] = got["0"]
        runtime.close()
    assert set(answers) == {"onnxruntime", "tensorrt"}
    same = np.equal(answers["onnxruntime"], answers["tensorrt"]).mean()
    assert same > 0.95
