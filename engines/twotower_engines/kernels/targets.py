"""GPUs that kernels are compiled for, and the PTX version for each.

A PTX file states the version of its language, and a driver refuses a newer one than it knows. The
compiler would state its newest (9.4, a driver of CUDA 13.4); the versions here are the oldest that
know the GPU, so that any driver that runs the GPU with CUDA 12.0 or later takes the file.
"""

from __future__ import annotations

from dataclasses import dataclass

from twotower_engines.errors import BuildError


@dataclass(frozen=True)
class Target:
    """One GPU generation.

    Attributes:
        compute_capability: As in `skus.json`, for example "9.0".
        ptx: Version of PTX times ten.
        cuda: The CUDA version whose driver first takes that PTX.
    """

    compute_capability: str
    ptx: int
    cuda: str

    @property
    def arch(self) -> int:
        """The number in `sm_90`."""
        major, minor = self.compute_capability.split(".")
        return 10 * int(major) + int(minor)


TARGETS = (
    Target("8.0", 80, "12.0"),  # A100
    Target("8.6", 80, "12.0"),  # A10, RTX 3090
    Target("8.9", 80, "12.0"),  # L4, L40S, RTX 4090
    Target("9.0", 80, "12.0"),  # H100, H200, GH200
    Target("10.0", 86, "12.7"),  # B200, GB200
    Target("10.3", 88, "12.9"),  # B300, GB300
    Target("12.0", 87, "12.8"),  # RTX PRO 6000 Blackwell, RTX 5090
    Target("12.1", 88, "12.9"),  # GB10 (DGX Spark)
)


def target(compute_capability: str) -> Target:
    """Return the target of a compute capability.

    Raises:
        BuildError: No kernel is compiled for it.
    """
    for candidate in TARGETS:
        if candidate.compute_capability == compute_capability:
            return candidate
    known = ", ".join(candidate.compute_capability for candidate in TARGETS)
    raise BuildError(
        f"no kernels for compute capability {compute_capability!r}; there are some for {known}"
    )
