"""The one place that imports ONNX Runtime: its telemetry is off before it is loaded.

From 1.32 on ONNX Runtime reports to its maker by default, and leaves a device's id in the cache. It
reads the variable that forbids both as it is loaded.
"""

from __future__ import annotations

import os
from typing import Any


def import_onnxruntime() -> Any:
    """Return the module `onnxruntime`.

    Raises:
        ImportError: It is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime  # noqa: TID251

    return onnxruntime
