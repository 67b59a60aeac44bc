"""FP8 weights under the real TensorRT-RTX: what its compiler makes of them, and a small build."""

from __future__ import annotations

import pytest

from tests.support.compiled import compiled
from twotower_contract.traffic import traffic_of

pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt-rtx-cu13`")


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_fp8_weights_are_read_as_8_bits_and_never_copied(tmp_path, tower, capability):
    """Layers of the released width at one row: the bar is 1.10 of the least bytes."""
    listing = compiled(tmp_path, tower, 1, 16, 8192, "MEM*EE", capability, "fp8")
    traffic = traffic_of(listing)
    weights = [name for _, name, _ in traffic.copies if not name.startswith("context.")]
    assert not weights
    assert traffic.ratio <= 1.10
    read = {one.name: one.bytes({}) for kernel in listing.kernels for one in kernel.reads}
    (up,) = [size for name, size in read.items() if name.endswith("layers.1.mixer.experts.up_proj")]
    assert up == 128 * 1856 * 2688
