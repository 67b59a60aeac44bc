"""twotower_export: from a TwoTower checkpoint to a bundle of graphs without weights.

Reads safetensors checkpoints, defines the towers, and writes what `twotower_engines` builds from.
Importing this package loads nothing heavy: torch, onnx and the hub's client are imported by the
modules that use them.
"""
