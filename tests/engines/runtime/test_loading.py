"""What is refused before plans are loaded, and loading, against fakes of TensorRT and CUDA."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest

import tests.support.cuda_fake as cudas
import tests.support.trt_fake as trts

pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")

from twotower_contract.digests import file_sha256
from twotower_contract.engine_set import BuildRecord, EngineFile, Limits
from twotower_contract.errors import EngineSetError
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.resident import loading
from twotower_engines.runtime.resident.cuda_device import CudaDevice, CudaError
from twotower_engines.runtime.resident.refusals import (
    check_build,
    check_gpus,
    check_room,
    placement,
)
from twotower_engines.runtime.resident.upload import upload_weights

LIMITS = Limits(slots=4, context=96, max_tokens_per_call=32, block_size_max=16)


@pytest.fixture
def cuda(monkeypatch):
    return cudas.install(monkeypatch, gpus=2)


def record(**changes):
    base = BuildRecord(
        sku="l40s",
        flavour="tensorrt",
        precision="bf16",
        limits=LIMITS,
        plans={
            "context": EngineFile("context.plan", ""),
            "denoiser": EngineFile("denoiser.plan", ""),
        },
        compute_capability="8.9",
        versions={"tensorrt": "11.4.0.106", "tensorrt_rtx": "1.7.1"},
    )
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "version", "capability", "message"),
    [
        ({}, "11.4.0.106", "9.0", r"built for `l40s` .compute capability 8.9.*cuda:0 has 9.0"),
        ({}, "10.13.2.1", "8.9", r"built with tensorrt 11.4.0.106, but 10.13.2.1"),
        ({}, "11.4.1.5", "8.9", r"built with tensorrt 11.4.0.106, but 11.4.1.5 is installed"),
        ({"flavour": "tensorrt-rtx"}, "1.6.0.9", "8.9", "built with tensorrt_rtx 1.7.1, but 1.6"),
        ({"machine": "riscv64"}, "11.4.0.106", "8.9", "on a riscv64 machine, but this one is"),
        ({"cuda": "13.4"}, "11.4.0.106", "8.9", r"for CUDA 13.4, .* of cuda:0 serves CUDA 13.1"),
    ],
)
def test_a_plan_for_another_machine_is_refused_by_name(changes, version, capability, message):
    with pytest.raises(RuntimeLoadError, match=message):
        check_build(record(**changes), version, "cuda:0", capability, 13010)


@pytest.mark.parametrize(
    ("changes", "version"),
    [
        ({}, "11.4.0.106"),
        ({"versions": {"tensorrt": "11.4.0"}}, "11.4.0.106"),
        ({"versions": {"tensorrt": "11.4.0.106.post1"}}, "11.4.0.106"),
        ({"versions": {}}, "10.13"),
        ({"flavour": "tensorrt-rtx"}, "1.7.2.3"),
        ({"machine": platform.machine(), "cuda": "13.1"}, "11.4.0.106"),
        ({"cuda": "12.9"}, "11.4.0.106"),
    ],
)
def test_a_plan_for_this_machine_is_taken(changes, version):
    check_build(record(**changes), version, "cuda:0", "8.9", 13010)


def test_towers_go_where_the_build_placed_them():
    assert placement(record()) == {"context": 0, "denoiser": 0}
    placed = {"context": 0, "denoiser": 1}
    assert placement(record(extra={"placement": placed})) == placed


@pytest.mark.parametrize(
    ("gpus", "placed", "message"),
    [
        (1, {"denoiser": 1}, "placed on 2 GPUs, one tower on each, but CUDA can use 1 here"),
        (0, {}, "need a GPU .l40s., but CUDA finds none"),
    ],
)
def test_too_few_gpus_are_counted(monkeypatch, gpus, placed, message):
    cudas.install(monkeypatch, gpus=gpus)
    with pytest.raises(RuntimeLoadError, match=message):
        check_gpus(record(extra={"placement": placed}))
    cudas.install(monkeypatch, gpus=2)
    check_gpus(record(extra={"placement": placed}))


def test_too_little_free_memory_is_refused_before_anything_travels(cuda):
    cuda.free[1] = 30_000_000
    share = {"total": 90_000_000, "overhead": 20_000_000}
    build = record(memory={"per_gpu": [share, share]})
    check_room(build, CudaDevice(0), 0, 1000)
    message = r"cuda:1 .*take 0.1 GB, 0.0 GB of it weights, but 0.0 GB are free"
    with pytest.raises(RuntimeLoadError, match=message):
        check_room(build, CudaDevice(1), 1, 1000)
    with pytest.raises(RuntimeLoadError, match=r"take 0.0 GB"):
        check_room(record(), CudaDevice(1), 1, 31_000_000)


# loading


@pytest.fixture
def placed(random_engines, tmp_path, monkeypatch):
    """An engine set of flavour `tensorrt` for two GPUs, whose plans are any bytes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    engines = random_engines("MEM*E*M", seed=11).engines
    plans = {}
    for tower in ("context", "denoiser"):
        path = tmp_path / f"{tower}.plan"
        path.write_bytes(tower.encode())
        plans[tower] = EngineFile(path.name, file_sha256(path))
    build = replace(
        engines.build,
        sku="h100-sxm",
        flavour="tensorrt",
        compute_capability="9.0",
        versions={"tensorrt": "11.4.0.106"},
        plans=plans,
        limits=LIMITS,
        memory={},
        extra={"placement": {"context": 0, "denoiser": 1}},
    )
    return replace(engines, folder=tmp_path, build=build)


def with_inputs(trt, engines):
    """Let the fake's engines have a profile for every call."""
    trt.profiles = [([1, 1], [4, 16], [64, 64])]
    trt.tensors = {"ids": "input", "logits": "output"}
    return engines


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda cuda, trt: setattr(trt, "__version__", "11.5.0.1"), "built with tensorrt"),
        (lambda cuda, trt: setattr(cuda, "capability", (8, 9)), "compute capability 9.0"),
        (lambda cuda, trt: setattr(cuda, "gpus", 1), "placed on 2 GPUs"),
        (lambda cuda, trt: setattr(cuda, "driver", 12080), "driver serves CUDA 12.8"),
        (lambda cuda, trt: cuda.free.__setitem__(1, 1000), r"cuda:1 .*but 0.0 GB are free"),
    ],
    ids=["version", "capability", "gpus", "driver", "memory"],
)
def test_what_can_be_refused_is_refused_before_a_plan_is_deserialized(
    cuda, monkeypatch, placed, break_it, message
):
    trt = trts.install(monkeypatch)
    break_it(cuda, trt)
    with pytest.raises(RuntimeLoadError, match=message):
        open_runtime(with_inputs(trt, placed))
    assert "deserialize_cuda_engine" not in trt.names()
    assert cuda.left() == 0, "devices that were opened are closed again"


def test_a_changed_plan_is_refused_before_cuda_is_asked(cuda, monkeypatch, placed):
    trt = trts.install(monkeypatch)
    placed.engine_path("denoiser").write_bytes(b"other")
    with pytest.raises(EngineSetError, match=r"denoiser.plan: its sha256"):
        open_runtime(placed)
    assert cuda.calls == []
    assert trt.calls == []


class Told:
    """Progress, written down."""

    def __init__(self):
        self.bytes, self.calls = [], []

    def __call__(self, done, total):
        self.bytes.append((done, total))

    def prepared(self, done, total):
        self.calls.append((done, total))


def test_plans_are_deserialized_before_the_first_weight_travels(cuda, monkeypatch, placed):
    trt, order, told = trts.install(monkeypatch), [], Told()
    real, deserialize = upload_weights, trt._deserialize
    monkeypatch.setattr(
        loading,
        "upload_weights",
        lambda *a, **given: order.append("upload") or real(*a, window=1 << 16, **given),
    )
    monkeypatch.setattr(trt, "_deserialize", lambda p: order.append(p) or deserialize(p))
    runtime = open_runtime(with_inputs(trt, placed), progress=told)
    assert order == [b"context", b"denoiser", "upload", "upload"]
    done = [one for one, _ in told.bytes]
    assert done == sorted(done)
    assert told.bytes[-1][0] == told.bytes[-1][1] == told.bytes[0][1]
    assert told.calls[-1] == (len(told.calls), len(told.calls))
    assert cuda.enabled_peers == {(0, 1), (1, 0)}
    runtime.close()
    assert cuda.left() == 0


@pytest.mark.parametrize("where", ["second plan", "upload", "prepare"])
def test_a_load_that_fails_frees_everything(cuda, monkeypatch, placed, where):
    trt = trts.install(monkeypatch)
    engines = with_inputs(trt, placed)
    if where == "second plan":
        answers = iter([trts.Engine(trt), None])
        monkeypatch.setattr(trt, "_deserialize", lambda plan: next(answers))
    elif where == "upload":
        cuda.cudaMallocHost = lambda size: cuda.failed(cuda.cudaError_t.cudaErrorMemoryAllocation)
    else:
        trt.profiles = [([1, 1], [1, 1], [64, 1])]
    with pytest.raises((RuntimeLoadError, CudaError)):
        open_runtime(engines)
    assert cuda.left() == 0
    assert int(cuda.last_error) == 0


def test_one_gpu_holds_both_towers_and_is_closed_once(cuda, monkeypatch, placed):
    trt = trts.install(monkeypatch)
    build = replace(placed.build, extra={})
    runtime = open_runtime(with_inputs(trt, replace(placed, build=build)))
    assert runtime._context.device is runtime._denoiser.device
    assert len(cuda.memory[1]) == 0
    runtime.close()
    assert cuda.left() == 0
    assert cuda.calls.count("cudaStreamDestroy") == 1


def test_rtx_engines_that_cannot_be_captured_are_enqueued(cuda, monkeypatch, placed, caplog):
    trt = trts.install(monkeypatch, is_rtx=True, version="1.7.1.5")
    trt.answers |= {"is_stream_capturable": False, "serialize": b"kernels"}
    build = replace(placed.build, flavour="tensorrt-rtx", versions={"tensorrt_rtx": "1.7.1"})
    with caplog.at_level(logging.WARNING):
        runtime = open_runtime(with_inputs(trt, replace(placed, build=build)))
    assert "cannot be captured as CUDA graphs" in caplog.text
    assert "cudaStreamBeginCapture" not in cuda.calls
    kept = list((Path(os.environ["XDG_CACHE_HOME"]) / "twotower" / "rtx-kernels").iterdir())
    assert len(kept) == 2
    runtime.close()
