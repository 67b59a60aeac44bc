"""The dtype of each weight of a tower in a format, as the default recipe would store it."""

from __future__ import annotations

from twotower_contract.layout import graph_weights
from twotower_contract.quantized import FORMAT_OF_DTYPE
from twotower_contract.sizes import is_narrow_by_default


def weight_dtypes(config, tower, format_=None, float32=()):
    """Stored dtypes by weight input; bfloat16 where no format is given or kept."""
    (codes,) = [dtype for dtype, one in FORMAT_OF_DTYPE.items() if one == format_] or ["BF16"]
    return {
        name: "F32"
        if name.endswith(tuple(float32))
        else codes
        if is_narrow_by_default(config, weight.sources[0])
        else "BF16"
        for name, weight in graph_weights(config, tower).items()
    }
