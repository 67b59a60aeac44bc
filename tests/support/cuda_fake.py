"""A fake of `cuda.bindings.runtime`: GPUs that are this machine's memory. It runs nothing on a GPU.

Faithful in what our code can get wrong: work waits in its stream until somebody waits for it (so a
buffer that is written again too early is seen), memory and handles may not be used once they are
freed, each address belongs to one GPU, an error stays the last error until it is asked for, and a
capture records instead of running. Constants, structures and error names are NVIDIA's own.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as real

from twotower_engines.runtime.resident import cuda_device

NVIDIAS = {
    "cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaMemcpy3DParms",
    "cudaMemcpy3DPeerParms", "make_cudaPitchedPtr", "make_cudaExtent", "cudaGetErrorName",
    "cudaGetErrorString", "cudaEventDisableTiming", "cudaStreamNonBlocking",
}  # fmt: skip
ERRORS = real.cudaError_t
OK = (ERRORS.cudaSuccess,)


def view(address, size):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


@dataclass
class Stream:
    device: int
    waiting: list = field(default_factory=list)
    done: int = 0
    captured: list | None = None
    is_spoiled: bool = False

    def put(self, work):
        if self.captured is not None:
            self.captured.append(work)
        else:
            self.waiting.append(work)

    def drain(self, upto=None):
        upto = len(self.waiting) if upto is None else upto
        while self.done < upto:
            self.done += 1
            self.waiting[self.done - 1]()


class FakeCuda:
    """Stands in for the module. `calls` has the name of every call."""

    def __init__(self, gpus=1, room=1 << 28, driver=13040, peers=True, capability=(9, 0)):
        self.gpus, self.driver, self.peers, self.capability = gpus, driver, peers, capability
        self.free = [room] * gpus
        self.memory = [{} for _ in range(gpus)]
        self.pinned, self.graveyard = {}, []
        self.handles = {}
        self.current = 0
        self.last_error = ERRORS.cudaSuccess
        self.enabled_peers = set()
        self.calls = []
        self._next = 1000

    def __getattribute__(self, name):
        if name.startswith("cuda") and name not in NVIDIAS:
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def __getattr__(self, name):
        assert name in NVIDIAS, f"the fake has no {name}"
        return getattr(real, name)

    # what tests ask

    def check(self, device, address, size):
        inside = any(
            start <= address and address + size <= start + length
            for start, (_, length) in self.memory[device].items()
        )
        assert inside, f"cuda:{device}: {size} bytes at {address:#x} are not allocated here"

    def submit(self, stream, work):
        """Run something in a stream's order, as an engine's kernels."""
        one = self.handle("stream", stream)
        assert self.current == one.device, "work for one GPU while another is current"
        one.put(work)

    def handle(self, kind, number):
        found, value = self.handles.get(int(number), (None, None))
        assert found == kind, f"{kind} {number} was destroyed, or never made"
        return value

    def left(self):
        """What nobody freed."""
        return sum(map(len, self.memory)) + len(self.pinned) + len(self.handles)

    def failed(self, error):
        self.last_error = error
        return error, None

    def _made(self, kind, value):
        self._next += 1
        self.handles[self._next] = (kind, value)
        return ERRORS.cudaSuccess, self._next

    def _destroyed(self, kind, number):
        self.handle(kind, number)
        del self.handles[int(number)]
        return OK

    # devices

    def cudaDriverGetVersion(self):
        return ERRORS.cudaSuccess, self.driver

    def cudaRuntimeGetVersion(self):
        return ERRORS.cudaSuccess, 13040

    def cudaGetDeviceCount(self):
        if self.driver // 1000 < 13:
            return self.failed(ERRORS.cudaErrorInsufficientDriver)
        return (
            (ERRORS.cudaSuccess, self.gpus) if self.gpus else self.failed(ERRORS.cudaErrorNoDevice)
        )

    def cudaGetDeviceProperties(self, index):
        major, minor = self.capability
        return ERRORS.cudaSuccess, SimpleNamespace(name=b"Fake GPU", major=major, minor=minor)

    def cudaSetDevice(self, index):
        assert 0 <= index < self.gpus
        self.current = index
        return OK

    def cudaGetLastError(self):
        error, self.last_error = self.last_error, ERRORS.cudaSuccess
        return (error,)

    def cudaDeviceCanAccessPeer(self, one, other):
        return ERRORS.cudaSuccess, int(self.peers)

    def cudaDeviceEnablePeerAccess(self, other, flags):
        pair = (self.current, other)
        if pair in self.enabled_peers:
            return self.failed(ERRORS.cudaErrorPeerAccessAlreadyEnabled)[:1]
        self.enabled_peers.add(pair)
        return OK

    # memory

    def cudaMemGetInfo(self):
        return ERRORS.cudaSuccess, self.free[self.current], 1 << 40

    def cudaMalloc(self, size):
        if size > self.free[self.current]:
            return self.failed(ERRORS.cudaErrorMemoryAllocation)
        self.free[self.current] -= size
        # poisoned: what nobody wrote must not matter
        array = np.full(size + 512, 0xFF, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.memory[self.current][address] = (array, size)
        return ERRORS.cudaSuccess, address

    def cudaFree(self, address):
        array, size = self.memory[self.current].pop(address)
        self.free[self.current] += size
        self.graveyard.append(array)
        return OK

    def cudaMallocHost(self, size):
        array = np.full(size, 0xFF, np.uint8)
        self.pinned[array.ctypes.data] = array
        return ERRORS.cudaSuccess, array.ctypes.data

    def cudaFreeHost(self, address):
        array = self.pinned.pop(address)
        array[:] = 0xFF  # what still reads it gets nonsense, not a crash
        self.graveyard.append(array)
        return OK

    def _is_on(self, device, address, size):
        starts = self.memory[device].items()
        return any(s <= address and address + size <= s + n for s, (_, n) in starts)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        one = self.handle("stream", stream)

        def work():
            for index in range(self.gpus):
                if index != one.device:
                    assert not self._is_on(index, target, 1), "a copy to another GPU"
                    assert not self._is_on(index, source, 1), "a copy from another GPU"
            ends = [self._is_on(one.device, place, size) for place in (target, source)]
            assert any(ends), f"{size} bytes from {source:#x} to {target:#x}: neither is a GPU's"
            view(target, size)[:] = view(source, size)

        self.submit(stream, work)
        return OK

    def cudaMemset2DAsync(self, target, pitch, value, width, height, stream):
        device = self.handle("stream", stream).device
        assert width <= pitch

        def work():
            for row in range(height):
                self.check(device, target + row * pitch, width)
                view(target + row * pitch, width)[:] = value

        self.submit(stream, work)
        return OK

    def cudaMemcpy3DAsync(self, copy, stream):
        assert copy.kind == real.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        device = self.handle("stream", stream).device
        return self._copy_box(copy, stream, device, device)

    def cudaMemcpy3DPeerAsync(self, copy, stream):
        assert copy.srcDevice != copy.dstDevice
        return self._copy_box(copy, stream, copy.srcDevice, copy.dstDevice)

    def _copy_box(self, copy, stream, source_device, target_device):
        width, height, depth = copy.extent.width, copy.extent.height, copy.extent.depth
        ends = []
        for end, device in ((copy.srcPtr, source_device), (copy.dstPtr, target_device)):
            assert width <= end.pitch < 1 << 31
            assert height <= end.ysize
            ends.append((int(end.ptr), end.pitch, end.pitch * end.ysize, device))

        def work():
            for layer in range(depth):
                for row in range(height):
                    places = []
                    for start, pitch, slice_pitch, device in ends:
                        places.append(start + layer * slice_pitch + row * pitch)
                        self.check(device, places[-1], width)
                    view(places[1], width)[:] = view(places[0], width)

        self.submit(stream, work)
        return OK

    # streams, events, graphs

    def cudaStreamCreateWithFlags(self, flags):
        return self._made("stream", Stream(self.current))

    def cudaStreamSynchronize(self, stream):
        one = self.handle("stream", stream)
        if one.captured is not None:
            one.is_spoiled = True
            return self.failed(ERRORS.cudaErrorStreamCaptureUnsupported)[:1]
        one.drain()
        return OK

    def cudaStreamDestroy(self, stream):
        return self._destroyed("stream", stream)

    def cudaEventCreateWithFlags(self, flags):
        return self._made("event", [None, 0])

    def cudaEventRecord(self, event, stream):
        one = self.handle("stream", stream)
        self.handle("event", event)[:] = [one, len(one.waiting)]
        return OK

    def cudaEventSynchronize(self, event):
        one, upto = self.handle("event", event)
        one.drain(upto)
        return OK

    def cudaEventDestroy(self, event):
        return self._destroyed("event", event)

    def cudaStreamWaitEvent(self, stream, event, flags):
        other, upto = self.handle("event", event)
        self.handle("stream", stream).put(partial(other.drain, upto))
        return OK

    def cudaStreamBeginCapture(self, stream, mode):
        one = self.handle("stream", stream)
        assert one.captured is None
        one.captured, one.is_spoiled = [], False
        return OK

    def cudaStreamEndCapture(self, stream):
        one = self.handle("stream", stream)
        captured, one.captured = one.captured, None
        if one.is_spoiled:
            return self.failed(ERRORS.cudaErrorStreamCaptureInvalidated)
        return self._made("graph", captured)

    def cudaGraphInstantiate(self, graph, flags):
        return self._made("graph exec", self.handle("graph", graph))

    def cudaGraphDestroy(self, graph):
        return self._destroyed("graph", graph)

    def cudaGraphLaunch(self, graph, stream):
        for work in self.handle("graph exec", graph):
            self.submit(stream, work)
        return OK

    def cudaGraphExecDestroy(self, graph):
        return self._destroyed("graph exec", graph)


def install(monkeypatch, **options):
    """Put a fake in the place of NVIDIA's module, and return it."""
    fake = FakeCuda(**options)
    monkeypatch.setattr(cuda_device, "_runtime", lambda: fake)
    return fake
