"""twotower_engines: plan, build, verify, run and serve engines of a bundle.

Reads what `twotower export` wrote, and nothing of its code. Importing this package loads nothing
heavy: numpy, onnxruntime and the GPU libraries are imported by the modules that use them.
"""
