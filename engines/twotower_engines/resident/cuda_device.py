"""One CUDA device, through cuda-python's runtime bindings. Needs an NVIDIA GPU and its driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_engines.errors import RuntimeLoadError
from twotower_engines.resident.device import Device, Fence

__all__ = ["CudaDevice", "CudaError", "check_peers"]


class CudaError(RuntimeError):
    """A CUDA call failed: a bug of ours, or a device that is lost."""


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as problem:
        raise RuntimeLoadError(
            "cuda-python is not installed; install it with `pip install 'twotower[tensorrt]'`"
        ) from problem
    return runtime


def _done(result: tuple[Any, ...]) -> Any:
    """Return what a call returned, without its status.

    Raises:
        CudaError: The status is an error.
    """
    status, *values = result
    if int(status) != 0:
        _, name = _runtime().cudaGetErrorName(status)
        _, text = _runtime().cudaGetErrorString(status)
        raise CudaError(f"{name.decode()}: {text.decode()}")
    return values[0] if values else None


class _Event:
    """A recorded event."""

    def __init__(self, cuda: Any, stream: Any) -> None:
        self._cuda = cuda
        self.handle = _done(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
        _done(cuda.cudaEventRecord(self.handle, stream))

    def wait(self) -> None:
        _done(self._cuda.cudaEventSynchronize(self.handle))

    def __del__(self) -> None:
        self._cuda.cudaEventDestroy(self.handle)


class CudaDevice:
    """See `device.Device`.

    Args:
        index: Which GPU.

    Raises:
        RuntimeLoadError: There is no such GPU, or no driver.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = cuda = _runtime()
        self.index = index
        self.name = f"cuda:{index}"
        status, count = cuda.cudaGetDeviceCount()
        if int(status) != 0 or index >= (count or 0):
            raise RuntimeLoadError(
                f"{self.name}: this machine has {count or 0} usable GPUs ({status.name}); run on "
                "the machine of the SKU, or build for the CPU with --sku cpu"
            )
        properties = _done(cuda.cudaGetDeviceProperties(index))
        self.model = properties.name.decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self._use()
        self.stream = _done(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self._allocated: list[int] = []
        self._pinned: list[int] = []
        self._graphs: list[Any] = []

    def _use(self) -> None:
        _done(self._cuda.cudaSetDevice(self.index))

    def free_memory(self) -> int:
        """Return how many bytes can still be allocated."""
        self._use()
        status, free, _ = self._cuda.cudaMemGetInfo()
        _done((status,))
        return int(free)

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes; CUDA aligns them to 256."""
        self._use()
        status, address = self._cuda.cudaMalloc(size)
        if int(status) != 0:
            raise RuntimeLoadError(
                f"{self.name} ({self.model}): no room for {size / 1e9:.2f} GB, "
                f"{self.free_memory() / 1e9:.2f} GB are free; build with fewer --slots or a "
                "shorter --context, and see `twotower plan`"
            )
        self._allocated.append(int(address))
        return int(address)

    def staging(self, size: int) -> npt.NDArray[Any]:
        """Return pinned host memory, (size,) uint8, filled with 0."""
        self._use()
        address = int(_done(self._cuda.cudaMallocHost(size)))
        self._pinned.append(address)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        array: npt.NDArray[Any] = np.ctypeslib.as_array(pointer, (size,))
        array[:] = 0
        return array

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to an address, in the stream's order."""
        self._copy(target, source.ctypes.data, source.nbytes)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, and wait for it."""
        self._copy(target.ctypes.data, source, target.nbytes)
        self.synchronize()

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy bytes between addresses, also between devices (unified addressing)."""
        self._copy(target, source, size)

    def _copy(self, target: int, source: int, size: int) -> None:
        self._use()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        _done(self._cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def copy_strided(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` runs of `width` bytes."""
        self._use()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        _done(
            self._cuda.cudaMemcpy2DAsync(
                target, target_pitch, source, source_pitch, width, rows, kind, self.stream
            )
        )

    def zero(self, target: int, size: int) -> None:
        """Fill bytes with 0."""
        self._use()
        _done(self._cuda.cudaMemsetAsync(target, 0, size, self.stream))

    def fence(self) -> Fence:
        """Mark this point of the stream."""
        self._use()
        return _Event(self._cuda, self.stream)

    def follow(self, other: Device) -> None:
        """Let the stream wait for another device's."""
        if not isinstance(other, CudaDevice) or other is self:
            return
        event = other.fence()
        self._use()
        _done(self._cuda.cudaStreamWaitEvent(self.stream, event.handle, 0))  # type: ignore[attr-defined]

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, record it as a CUDA graph, and return the graph's launch."""
        cuda = self._cuda
        self._use()
        work()  # what an engine sets up lazily may not happen inside a capture
        self.synchronize()
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _done(cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        finally:
            graph = _done(cuda.cudaStreamEndCapture(self.stream))
        launchable = _done(cuda.cudaGraphInstantiate(graph, 0))
        _done(cuda.cudaGraphDestroy(graph))
        self._graphs.append(launchable)

        def launch() -> None:
            self._use()
            _done(cuda.cudaGraphLaunch(launchable, self.stream))

        return launch

    def synchronize(self) -> None:
        """Wait until all that was asked is done."""
        self._use()
        _done(self._cuda.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free graphs, memory and stream."""
        self._use()
        for graph in self._graphs:
            _done(self._cuda.cudaGraphExecDestroy(graph))
        for address in self._allocated:
            _done(self._cuda.cudaFree(address))
        for address in self._pinned:
            _done(self._cuda.cudaFreeHost(address))
        _done(self._cuda.cudaStreamDestroy(self.stream))
        self._graphs, self._allocated, self._pinned = [], [], []


def check_peers(first: CudaDevice, second: CudaDevice) -> None:
    """Let two GPUs read each other's memory, where the machine can.

    Without peer access the same copies go through the host: slower, not wrong.
    """
    cuda = _runtime()
    for one, other in ((first, second), (second, first)):
        if _done(cuda.cudaDeviceCanAccessPeer(one.index, other.index)):
            _done(cuda.cudaSetDevice(one.index))
            status = cuda.cudaDeviceEnablePeerAccess(other.index, 0)[0]
            if status != cuda.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
                _done((status,))
