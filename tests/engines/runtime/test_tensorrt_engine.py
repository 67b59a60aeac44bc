"""TensorRT plans as engines, against fakes of TensorRT and CUDA: no GPU runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import tests.support.cuda_fake as cudas
import tests.support.trt_fake as trts

pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")

from twotower_contract.engine_set import Limits
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.resident.cuda_device import CudaDevice, CudaError
from twotower_engines.runtime.resident.tensorrt_engine import TensorRtEngine

LIMITS = Limits(slots=4, context=96, max_tokens_per_call=32, block_size_max=16)


@pytest.fixture
def cuda(monkeypatch):
    return cudas.install(monkeypatch, gpus=2)


@pytest.fixture(params=[False, True], ids=["tensorrt", "tensorrt-rtx"])
def trt(monkeypatch, request):
    return trts.install(monkeypatch, is_rtx=request.param)


def open_engine(trt, tmp_path, device=None):
    plan = tmp_path / "context.plan"
    plan.write_bytes(b"a plan")
    flavour = "tensorrt-rtx" if trt.is_rtx else "tensorrt"
    return TensorRtEngine(plan, flavour, device or CudaDevice(), tmp_path / "kernels" / "a.cache")


@pytest.mark.parametrize(
    ("module", "fake"),
    [("tensorrt_bindings", trts.API), ("tensorrt_rtx", trts.API), ("tensorrt_rtx", trts.RTX)],
)
def test_the_fakes_names_are_nvidias(tensorrt_environment, module, fake):
    """Both of NVIDIA's packages have the names; each in a process of its own."""
    script = (
        f"import json, {module} as trt; n = {list(fake)!r}; "
        "print(json.dumps({one: dir(getattr(trt, one) if one else trt) for one in n}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        env=tensorrt_environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for kind, names in json.loads(found.stdout).items():
        assert fake[kind] <= set(names), kind


def test_an_engine_knows_its_tensors_and_holds_one_workspace(cuda, trt, tmp_path):
    engine = open_engine(trt, tmp_path)
    assert engine.inputs == ("ids", "lengths", "embedding")
    assert engine.outputs == ("new",)
    engine.prepare({"ids": (1, 1)})
    engine.prepare({"ids": (2, 16)})
    placed = {arguments for _, name, arguments in trt.calls if name == "set_device_memory"}
    assert len(placed) == 1
    ((address, size),) = placed
    cuda.check(0, address, size)


def test_every_context_leaves_its_memory_to_us(cuda, trt, tmp_path):
    engine = open_engine(trt, tmp_path)
    engine.prepare({"ids": (1, 1)})
    engine.prepare({"ids": (2, 16)})
    created = [args for _, name, args in trt.calls if name == "create_execution_context"]
    assert len(created) == 2
    if trt.is_rtx:  # the setting is that of the configuration which each context gets
        strategy = "set_execution_context_allocation_strategy"
        (setting,) = [args for _, name, args in trt.calls if name == strategy]
        assert setting == ("user managed",)
    else:
        assert created == [("user managed",)] * 2


def test_a_tensor_that_would_be_allocated_at_every_call_is_refused(cuda, trt, tmp_path):
    trt.answers["get_tensor_shape"] = [2, -1]
    with pytest.raises(RuntimeLoadError, match=r"profile 0: the size of new, \(2, -1\), is known"):
        open_engine(trt, tmp_path).prepare({"ids": (1, 1)})
    trt.answers["get_tensor_location"] = "host"
    with pytest.raises(RuntimeLoadError, match=r"context.plan: the engine wants ids, lengths, "):
        open_engine(trt, tmp_path)


@pytest.mark.parametrize(
    ("ids", "profile"), [((1, 1), 0), ((16, 1), 0), ((1, 2), 1), ((4, 16), 1), ((16, 64), 1)]
)
def test_the_first_profile_that_takes_a_call_is_chosen(cuda, trt, tmp_path, ids, profile):
    device = CudaDevice()
    call = open_engine(trt, tmp_path, device).prepare({"ids": ids, "lengths": ids[:1], "odd": (3,)})
    trt.calls.append(("", "bind", ()))
    call.bind({"ids": 0x1000, "new": 0x2000, "unknown": 0x3000})
    call.enqueue()
    after = trt.names().index("create_execution_context")
    assert [(name, arguments) for _, name, arguments in trt.calls[after + 2 :]] == [
        ("set_optimization_profile_async", (profile, int(device.stream))),
        ("set_input_shape", ("ids", ids)),
        ("set_input_shape", ("lengths", ids[:1])),
        ("bind", ()),
        ("set_tensor_address", ("ids", 0x1000)),
        ("set_tensor_address", ("new", 0x2000)),
        ("execute_async_v3", (int(device.stream),)),
    ]


@pytest.mark.parametrize("ids", [(17, 1), (1, 65)])
def test_a_call_that_no_profile_takes_is_refused_with_what_they_take(cuda, trt, tmp_path, ids):
    engine = open_engine(trt, tmp_path)
    with pytest.raises(RuntimeLoadError, match=r"no profile .* ids of shape .*\(1, 1\) to \(16, 1"):
        engine.prepare({"ids": ids})


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("set_optimization_profile_async", False, r"profile 0 cannot be chosen on cuda:0"),
        ("set_input_shape", False, r"does not take ids of shape \(1, 1\)"),
        ("create_execution_context", None, r"cuda:0: TensorRT cannot make an execution context"),
    ],
)
def test_what_tensorrt_refuses_is_said(cuda, trt, tmp_path, method, answer, message):
    engine = open_engine(trt, tmp_path)
    trt.answers[method] = answer
    with pytest.raises(RuntimeLoadError, match=message):
        engine.prepare({"ids": (1, 1)})


def test_a_plan_that_tensorrt_cannot_load_is_named(cuda, trt, tmp_path):
    trt.answers["deserialize_cuda_engine"] = None
    with pytest.raises(RuntimeLoadError, match=r"context.plan: tensorrt.* 11.4.0.106 cannot load"):
        open_engine(trt, tmp_path)


def test_an_enqueue_that_fails_and_an_address_that_is_refused_are_said(cuda, trt, tmp_path):
    call = open_engine(trt, tmp_path).prepare({"ids": (1, 1)})
    trt.answers |= {"execute_async_v3": False, "set_tensor_address": False}
    with pytest.raises(CudaError, match="cuda:0: TensorRT could not enqueue"):
        call.enqueue()
    with pytest.raises(RuntimeLoadError, match="does not take an address for ids"):
        call.bind({"ids": 0x1000})


def test_each_engine_works_with_its_own_gpu_current(cuda, trt, tmp_path):
    """TensorRT uses the thread's current device, which another GPU's copies have changed."""
    first, second = CudaDevice(0), CudaDevice(1)
    first.use()
    engine = open_engine(trt, tmp_path, second)
    assert cuda.current == 1
    first.use()
    call = engine.prepare({"ids": (1, 1)})
    assert cuda.current == 1
    first.use()
    call.enqueue()
    assert cuda.current == 1


def test_tensorrt_rtx_compiles_at_once_and_keeps_what_it_compiled(cuda, monkeypatch, tmp_path):
    trt = trts.install(monkeypatch, is_rtx=True)
    trt.answers["serialize"] = b"kernels"
    for known in (False, True):
        trt.calls.clear()
        engine = open_engine(trt, tmp_path)
        config = engine._config
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        asked = [arguments for _, name, arguments in trt.calls if name == "deserialize"]
        assert asked == ([(b"kernels",)] if known else [])
        names = trt.names()
        assert "set_execution_context_allocation_strategy" in names
        assert "set_runtime_cache" in names
        engine.prepare({"ids": (1, 1)})
        made = [arguments for _, name, arguments in trt.calls if "create_execution" in name]
        assert made == [(config,)]
        engine.keep_kernels()
        assert [path.name for path in (tmp_path / "kernels").iterdir()] == ["a.cache"]


def test_tensorrt_rtx_is_asked_whether_it_can_be_captured(cuda, monkeypatch, tmp_path):
    trt = trts.install(monkeypatch, is_rtx=True)
    device = CudaDevice()
    call = open_engine(trt, tmp_path, device).prepare({"ids": (1, 1)})
    for answer in (True, False):
        trt.answers["is_stream_capturable"] = answer
        assert call.can_capture() is answer
    assert trt.calls[-1][1:] == ("is_stream_capturable", (int(device.stream),))


def test_tensorrt_proper_has_no_caches_and_can_be_captured(cuda, monkeypatch, tmp_path):
    trt = trts.install(monkeypatch)
    engine = open_engine(trt, tmp_path)
    call = engine.prepare({"ids": (1, 1)})
    assert call.can_capture()
    engine.keep_kernels()
    assert not (tmp_path / "kernels").exists()
    made = [arguments for _, name, arguments in trt.calls if "create_execution" in name]
    assert made == [("user managed",)]
