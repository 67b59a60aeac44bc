"""One CUDA device, through cuda-python's runtime bindings. Needs an NVIDIA GPU and its driver."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower_contract.errors import TwoTowerError
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime.resident.device import Box, Device, Fence


class CudaError(TwoTowerError):
    """A CUDA call failed: a device that is lost, a driver in trouble, or a bug of ours."""

    exit_code = 1


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as problem:
        raise RuntimeLoadError(
            "cuda-python is not installed; install it with `pip install 'twotower[tensorrt]'`, or "
            "`pip install 'twotower[rtx]'` for engines of the flavour tensorrt-rtx"
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
        _forget_error()
        raise CudaError(f"{name.decode()}: {text.decode()}")
    return values[0] if values else None


def _forget_error() -> None:
    """Clear CUDA's last error, which TensorRT would otherwise report after its next launch."""
    _runtime().cudaGetLastError()


def cuda_version(number: int) -> str:
    """Return a version as CUDA gives it, for example 13010, as `13.1`."""
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_cuda() -> int:
    """Return the newest CUDA that the driver serves, for example 13010; 0 without a driver."""
    return int(_done(_runtime().cudaDriverGetVersion()))


def usable_gpus() -> int:
    """Return how many GPUs CUDA can use.

    Raises:
        RuntimeLoadError: There is no driver, or it is too old for cuda-python.
    """
    cuda = _runtime()
    status, count = cuda.cudaGetDeviceCount()
    if int(status) == 0:
        return int(count)
    _forget_error()
    driver = driver_cuda()
    if status == cuda.cudaError_t.cudaErrorInsufficientDriver and driver:
        needed = cuda_version(int(_done(cuda.cudaRuntimeGetVersion())))
        raise RuntimeLoadError(
            f"the NVIDIA driver serves CUDA {cuda_version(driver)}, but cuda-python is for CUDA "
            f"{needed}; update the driver, or install the cuda-python of its CUDA version"
        )
    if not driver:
        raise RuntimeLoadError(
            "this machine has no NVIDIA driver; run on the machine of the SKU, or build for the "
            "CPU with --sku cpu"
        )
    if status != cuda.cudaError_t.cudaErrorNoDevice:
        _done((status,))
    return 0


class _Event:
    """A recorded event."""

    def __init__(self, cuda: Any, stream: Any) -> None:
        self._cuda = cuda
        self.handle = _done(cuda.cudaEventCreateWithFlags(cuda.cudaEventDisableTiming))
        _done(cuda.cudaEventRecord(self.handle, stream))

    def wait(self) -> None:
        _done(self._cuda.cudaEventSynchronize(self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._cuda.cudaEventDestroy(self.handle)


class CudaDevice:
    """See `device.Device`.

    Raises:
        RuntimeLoadError: There is no such GPU, or no driver that serves it.
    """

    def __init__(self, index: int = 0) -> None:
        self._cuda = cuda = _runtime()
        self.index = index
        self.name = f"cuda:{index}"
        count = usable_gpus()
        if index >= count:
            raise RuntimeLoadError(
                f"{self.name}: this machine has {count} usable GPUs; run on the machine of the "
                "SKU, or build for the CPU with --sku cpu"
            )
        properties = _done(cuda.cudaGetDeviceProperties(index))
        self.model = properties.name.decode()
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.use()
        self.stream = _done(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking))
        self._is_closed = False
        self._allocated: list[int] = []
        self._pinned: set[int] = set()
        self._graphs: list[Any] = []

    def use(self) -> None:
        """Make this the current device of the thread, for calls that take no stream."""
        _done(self._cuda.cudaSetDevice(self.index))

    def free_memory(self) -> int:
        """Return how many bytes can still be allocated."""
        self.use()
        status, free, _ = self._cuda.cudaMemGetInfo()
        _done((status,))
        return int(free)

    def allocate(self, size: int) -> int:
        """Return the address of `size` new bytes; CUDA aligns them to 256."""
        self.use()
        status, address = self._cuda.cudaMalloc(size)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            _forget_error()
            raise RuntimeLoadError(
                f"{self.name} ({self.model}): no room for {size / 1e9:.2f} GB, "
                f"{self.free_memory() / 1e9:.2f} GB are free; end what else uses this GPU, or "
                "build with fewer --slots or a shorter --context (see `twotower plan`)"
            )
        _done((status,))
        self._allocated.append(int(address))
        return int(address)

    def staging(self, size: int) -> npt.NDArray[Any]:
        """Return pinned host memory, (size,) uint8, filled with 0."""
        self.use()
        address = int(_done(self._cuda.cudaMallocHost(size)))
        self._pinned.add(address)
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
        array: npt.NDArray[Any] = np.ctypeslib.as_array(pointer, (size,))
        array[:] = 0
        return array

    def free_staging(self, memory: npt.NDArray[Any]) -> None:
        """Free pinned memory."""
        self.use()
        address = memory.ctypes.data
        self._pinned.remove(address)
        _done(self._cuda.cudaFreeHost(address))

    def upload(self, target: int, source: npt.NDArray[Any]) -> None:
        """Copy a contiguous host array to an address, in the stream's order."""
        self._copy(target, source.ctypes.data, source.nbytes)

    def download(self, target: npt.NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, and wait for it."""
        self._copy(target.ctypes.data, source, target.nbytes)
        self.synchronize()

    def _copy(self, target: int, source: int, size: int) -> None:
        self.use()
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        _done(self._cuda.cudaMemcpyAsync(target, source, size, kind, self.stream))

    def copy_box(
        self, target: Box, source: Box, width: int, rows: int, layers: int, to: Device
    ) -> None:
        """Copy rows of layers, to another GPU peer to peer.

        Between GPUs without peer access CUDA takes such a copy through host memory, which it
        promises for its peer calls alone.
        """
        cuda = self._cuda
        self.use()
        is_here = to is self
        copy = cuda.cudaMemcpy3DParms() if is_here else cuda.cudaMemcpy3DPeerParms()
        copy.srcPtr = cuda.make_cudaPitchedPtr(source.address, source.pitch, width, source.height)
        copy.dstPtr = cuda.make_cudaPitchedPtr(target.address, target.pitch, width, target.height)
        copy.extent = cuda.make_cudaExtent(width, rows, layers)
        if is_here:
            copy.kind = cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            _done(cuda.cudaMemcpy3DAsync(copy, self.stream))
            return
        if not isinstance(to, CudaDevice):
            raise TypeError(f"{self.name} copies to CUDA devices only, not to {to.name}")
        copy.srcDevice, copy.dstDevice = self.index, to.index
        _done(cuda.cudaMemcpy3DPeerAsync(copy, self.stream))

    def zero(self, target: int, pitch: int, width: int, rows: int) -> None:
        """Fill rows with 0."""
        self.use()
        _done(self._cuda.cudaMemset2DAsync(target, pitch, 0, width, rows, self.stream))

    def fence(self) -> Fence:
        """Mark this point of the stream."""
        self.use()
        return _Event(self._cuda, self.stream)

    def follow(self, other: Device) -> None:
        """Let the stream wait for another device's."""
        if not isinstance(other, CudaDevice) or other is self:
            return
        event = other.fence()
        self.use()
        _done(self._cuda.cudaStreamWaitEvent(self.stream, event.handle, 0))  # type: ignore[attr-defined]

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` once, record it as a CUDA graph, and return the graph's launch."""
        cuda = self._cuda
        self.use()
        work()  # an engine's lazy set-up must not happen inside a capture
        self.synchronize()
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _done(cuda.cudaStreamBeginCapture(self.stream, mode))
        try:
            work()
        except BaseException:
            # the error has spoiled the capture, and EndCapture would only repeat that
            _, graph = cuda.cudaStreamEndCapture(self.stream)
            if graph is not None and int(graph):
                cuda.cudaGraphDestroy(graph)
            _forget_error()
            raise
        graph = _done(cuda.cudaStreamEndCapture(self.stream))
        try:
            launchable = _done(cuda.cudaGraphInstantiate(graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)
        self._graphs.append(launchable)

        def launch() -> None:
            self.use()
            _done(cuda.cudaGraphLaunch(launchable, self.stream))

        return launch

    def drop_captures(self) -> None:
        """Free the graphs."""
        for graph in self._graphs:
            self._cuda.cudaGraphExecDestroy(graph)
        self._graphs.clear()

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self.use()
        _done(self._cuda.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free graphs, memory and stream.

        Statuses are ignored: on a lost device each call fails with the error that was raised when
        it was lost, and nothing can be done about it.
        """
        if self._is_closed:
            return
        self._is_closed = True
        cuda = self._cuda
        cuda.cudaSetDevice(self.index)
        cuda.cudaStreamSynchronize(self.stream)
        for graph in self._graphs:
            cuda.cudaGraphExecDestroy(graph)
        for address in self._allocated:
            cuda.cudaFree(address)
        for address in self._pinned:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(self.stream)
        self._graphs, self._allocated, self._pinned = [], [], set()
        _forget_error()


def enable_peer_access(first: CudaDevice, second: CudaDevice) -> bool:
    """Let two GPUs read each other's memory, where the machine can; returns whether it can.

    Without peer access the same copies go through the host, which is slower but right.
    """
    cuda = _runtime()
    can = True
    for one, other in ((first, second), (second, first)):
        if not _done(cuda.cudaDeviceCanAccessPeer(one.index, other.index)):
            can = False
            continue
        one.use()
        (status,) = cuda.cudaDeviceEnablePeerAccess(other.index, 0)
        if status == cuda.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
            _forget_error()
        else:
            _done((status,))
    return can
