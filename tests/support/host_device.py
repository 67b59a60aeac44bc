"""A device that is this machine's memory, and engines that are ONNX Runtime sessions.

They stand in for CUDA and TensorRT, which need a GPU: buffers, windows, copies and captured calls
of the resident runtime run for real, on addresses. What they cannot show is a copy that is asked
for too early: everything here happens at once.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime as ort

from twotower_contract.layout import ROW_LISTS
from twotower_engines.building.flavours.refine_rows import list_rows
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
    copies: int = 0
    closes: int = 0
    kept: dict = field(default_factory=dict)
    staged: dict = field(default_factory=dict)

    def free_memory(self):
        return self.room

    def allocate(self, size):
        self.open()
        if size > self.room:
            raise RuntimeLoadError(f"{self.name}: no room for {size} bytes")
        self.room -= size
        # poisoned: what nobody wrote must not matter
        array = np.full(size + 512, 0xFF, np.uint8)
        address = -(-array.ctypes.data // 256) * 256
        self.kept[address] = (array, size)
        return address

    def check(self, address, size):
        self.open()
        inside = any(
            start <= address and address + size <= start + length
            for start, (_, length) in self.kept.items()
        )
        assert inside, f"{self.name}: {size} bytes at {address:#x} are not allocated here"

    def staging(self, size):
        self.open()
        array = np.zeros(size, np.uint8)
        self.staged[array.ctypes.data] = array
        return array

    def free_staging(self, memory):
        # what is still read from there would be seen
        self.staged.pop(memory.ctypes.data)[:] = 0xFF

    def upload(self, target, source):
        self.check(target, source.nbytes)
        view(target, source.nbytes)[:] = source.view(np.uint8).reshape(-1)

    def download(self, target, source):
        self.check(source, target.nbytes)
        target.view(np.uint8).reshape(-1)[:] = view(source, target.nbytes)

    def copy_box(self, target, source, width, rows, layers, to):
        assert width <= min(target.pitch, source.pitch)
        assert rows <= min(target.height, source.height)
        self.copies += 1
        for layer in range(layers):
            for row in range(rows):
                begin, end = (
                    box.address + layer * box.layer + row * box.pitch for box in (source, target)
                )
                self.check(begin, width)
                to.check(end, width)
                view(end, width)[:] = view(begin, width)

    def zero(self, target, pitch, width, rows):
        self.copies += 1
        for row in range(rows):
            self.check(target + row * pitch, width)
            view(target + row * pitch, width)[:] = 0

    def fence(self):
        return Done()

    def follow(self, other):
        self.open()
        other.open()

    def capture(self, work):
        self.captures += 1
        work()
        return work

    def drop_captures(self):
        self.open()

    def synchronize(self):
        self.open()

    def open(self):
        assert not self.closes, f"{self.name}: is closed"

    def close(self):
        self.closes += 1
        assert self.closes == 1, f"{self.name}: is closed twice"
        self.kept.clear()


class HostEngine:
    """An ONNX Runtime session that reads and writes at bound addresses.

    The denoiser takes lists of rows, as engines for GPUs do; without, it is one of those that were
    built before there were any.

    `check` says whether an address is the device's, `submit` runs a call in the order of its
    stream; both are the host device's own where not given. Tensors must lie at multiples of 256, as
    TensorRT asks.
    """

    def __init__(self, path, device, check=None, submit=None, can_capture=True, has_lists=True):
        model = onnx.load(path)
        if has_lists:
            list_rows(model)
        self.session = ort.InferenceSession(model.SerializeToString())
        self.check = check or device.check
        self.submit = submit or (lambda work: work())
        self.can_capture = can_capture
        self.prepared, self.listed = [], []
        self.is_closed = False
        self.types = {one.name: DTYPES[one.type] for one in self.session.get_inputs()}
        self.static = {one.name: one.shape for one in self.session.get_inputs()}
        self.inputs = tuple(self.types)
        self.outputs = tuple(one.name for one in self.session.get_outputs())

    def prepare(self, shapes):
        known = {n: s for n, s in self.static.items() if all(isinstance(d, int) for d in s)}
        self.prepared.append(shapes["ids"])
        self.listed.append({name for name in ROW_LISTS if any(shapes.get(name, ()))})
        return HostCall(self, {**known, **shapes})

    def close(self):
        assert not self.is_closed
        self.is_closed = True


class HostCall:
    def __init__(self, engine, shapes):
        self.engine, self.shapes, self.addresses = engine, shapes, {}

    def bind(self, addresses):
        misplaced = {name: address for name, address in addresses.items() if address % 256}
        assert not misplaced, misplaced
        self.addresses.update(addresses)

    def can_capture(self):
        return self.engine.can_capture

    def enqueue(self):
        # the addresses of now: what is bound later is for the next call
        addresses = dict(self.addresses)
        self.engine.submit(lambda: self.run(addresses))

    def run(self, addresses):
        engine = self.engine
        assert not engine.is_closed
        feed = {}
        for name, kind in engine.types.items():
            shape = self.shapes[name]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            engine.check(addresses[name], size)
            feed[name] = view(addresses[name], size).view(kind).reshape(shape)
        for name, value in zip(
            engine.outputs, engine.session.run(engine.outputs, feed), strict=True
        ):
            engine.check(addresses[name], value.nbytes)
            view(addresses[name], value.nbytes)[:] = value.view(np.uint8).reshape(-1)
