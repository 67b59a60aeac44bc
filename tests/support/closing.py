"""What every runtime does when it is closed."""

from __future__ import annotations

import numpy as np
import pytest

from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow, Runtime


def check_closing(runtime: Runtime) -> None:
    """Close a runtime twice; each call after that must say that it is closed."""
    runtime.close()
    runtime.close()
    block = np.full(8, 3, np.int32)
    calls = (
        lambda: runtime.reset(0),
        lambda: runtime.extend([ExtendRow(0, block)]),
        lambda: runtime.denoise([DenoiseRow(0, block, threshold=0.9, steps_left=1)]),
        lambda: runtime.predict([PredictRow(0, 5)]),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="these engines are closed; open the engine set"):
            call()
