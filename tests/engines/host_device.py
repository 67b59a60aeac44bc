"""A device that is this machine's memory, and engines that are ONNX Runtime sessions.

They stand in for CUDA and TensorRT, which need a GPU: buffers, windows, copies and captured calls
of the resident runtime run for real, on addresses. What they cannot show is a copy that is asked
for too early: everything here happens at once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort

from twotower_engines.errors import RuntimeLoadError

DTYPES = {"tensor(int32)": np.int32, "tensor(float)": np.float32}


def view(address, size):
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8)), (size,))


class Done:
    def wait(self):
        pass


@dataclass
class HostDevice:
    name: str = "host:0"
    room: int = 1 << 30
    captures: int = 0
    kept: dict = field(default_factory=dict)

    def free_memory(self):
        return self.room

    def allocate(self, size):
        if size > self.room:
            raise RuntimeLoadError(f"{self.name}: no room for {size} bytes")
        self.room -= size
        # poisoned: what nobody wrote must not matter
        array = np.full(size + 512, 0xFF, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.kept[address] = (array, size)
        return address

    def check(self, address, size):
        inside = any(
            start <= address and address + size <= start + length
            for start, (_, length) in self.kept.items()
        )
        assert inside, f"{self.name}: {size} bytes at {address:#x} are not allocated here"

    def staging(self, size):
        return np.zeros(size, np.uint8)

    def upload(self, target, source):
        self.check(target, source.nbytes)
        view(target, source.nbytes)[:] = source.view(np.uint8).reshape(-1)

    def download(self, target, source):
        self.check(source, target.nbytes)
        target.view(np.uint8).reshape(-1)[:] = view(source, target.nbytes)

    def copy(self, target, source, size):
        self.check(source, size)
        view(target, size)[:] = view(source, size)

    def copy_strided(self, target, target_pitch, source, source_pitch, width, rows):
        for row in range(rows):
            self.copy(target + row * target_pitch, source + row * source_pitch, width)

    def zero(self, target, size):
        self.check(target, size)
        view(target, size)[:] = 0

    def fence(self):
        return Done()

    def follow(self, other):
        pass

    def capture(self, work):
        self.captures += 1
        return work

    def synchronize(self):
        pass

    def close(self):
        self.kept.clear()


class HostEngine:
    """An ONNX Runtime session that reads and writes at bound addresses."""

    def __init__(self, path, device):
        self.session = ort.InferenceSession(str(path))
        self.device = device
        self.types = {one.name: DTYPES[one.type] for one in self.session.get_inputs()}
        self.static = {one.name: one.shape for one in self.session.get_inputs()}
        self.inputs = tuple(self.types)
        self.outputs = tuple(one.name for one in self.session.get_outputs())

    def prepare(self, shapes):
        known = {n: s for n, s in self.static.items() if all(isinstance(d, int) for d in s)}
        return HostCall(self, {**known, **shapes})

    def close(self):
        pass


class HostCall:
    def __init__(self, engine, shapes):
        self.engine, self.shapes, self.addresses = engine, shapes, {}

    def bind(self, addresses):
        self.addresses.update(addresses)

    def enqueue(self):
        engine = self.engine
        feed = {}
        for name, kind in engine.types.items():
            shape = self.shapes[name]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            engine.device.check(self.addresses[name], size)
            feed[name] = view(self.addresses[name], size).view(kind).reshape(shape)
        for name, value in zip(
            engine.outputs, engine.session.run(engine.outputs, feed), strict=True
        ):
            engine.device.check(self.addresses[name], value.nbytes)
            view(self.addresses[name], value.nbytes)[:] = value.view(np.uint8).reshape(-1)
