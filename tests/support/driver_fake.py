"""A fake of `cuda.bindings.driver` for launches: it reads arguments as a GPU would; nothing runs.

What the entry of a PTX file declares decides how many bytes are read at each address, so a list
that is too short, too long or in another order gives other values, or a crash of this process.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, field

SHARED_MEMORY = 48 * 1024
LARGEST_GRID = (2**31 - 1, 65535, 65535)


@dataclass
class Launched:
    """One launch. `arguments` has addresses and integers in the entry's order."""

    entry: str
    grid: tuple[int, int, int]
    arguments: list[int]


@dataclass
class FakeDriver:
    """Stands in for the module; `launched` has every launch."""

    launched: list[Launched] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    functions: list[tuple[str, str]] = field(default_factory=list)

    def cuModuleLoadData(self, image: bytes) -> tuple[int, int]:
        assert image.endswith(b"\0"), "the driver reads up to a zero byte"
        self.modules.append(image[:-1].decode())
        return 0, len(self.modules) - 1

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, int]:
        ptx = self.modules[module]
        assert f".visible .entry {name.decode()}(" in ptx
        self.functions.append((ptx, name.decode()))
        return 0, len(self.functions) - 1

    def cuLaunchKernel(
        self,
        function: int,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        block_x: int,
        block_y: int,
        block_z: int,
        shared: int,
        stream: int,
        parameters: int,
        extra: int,
    ) -> tuple[int]:
        ptx, entry = self.functions[function]
        grid = (grid_x, grid_y, grid_z)
        assert all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True))
        assert (block_y, block_z, extra) == (1, 1, 0)
        threads = re.search(r"^\.reqntid (\d+)", ptx, re.MULTILINE)
        assert threads is not None
        assert int(threads[1]) == block_x
        assert shared <= SHARED_MEMORY, "nobody asked the driver for more"
        declared = re.search(rf"\.entry {re.escape(entry)}\((.*?)\n\)", ptx, re.DOTALL)
        assert declared is not None
        kinds = [
            ctypes.c_int32 if ".u32" in line else ctypes.c_uint64
            for line in declared[1].strip().splitlines()
        ]
        places = (ctypes.c_void_p * len(kinds)).from_address(parameters)
        read = [kind.from_address(at).value for kind, at in zip(kinds, places, strict=True)]
        self.launched.append(Launched(entry, grid, read))
        return (0,)

    def cuGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, f"error {status}".encode()
