"""What Triton loads; the model itself is in `twotower_engines.serving.generate`."""

from twotower_engines.serving.generate import TritonPythonModel

__all__ = ["TritonPythonModel"]
