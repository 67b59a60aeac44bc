"""What Triton loads; the model itself is in `twotower_engines.serving.preprocess`."""

from twotower_engines.serving.preprocess import TritonPythonModel

__all__ = ["TritonPythonModel"]
