"""The runtime of engines whose weights and states live on a device.

`device.py` is the interface of a device and `engine.py` that of an engine; `runtime.py`,
`states.py` and `upload.py` are written against those two and run on any; `cuda_device.py` and
`tensorrt_engine.py` are the real ones.
"""
