"""Serving: what the Triton models do, the packager of the model repository, and the server.

Triton loads `triton_repo/<model>/1/model.py`, a few lines each, which take their class from
`preprocessing`, `twotower` or `postprocessing` here. Those three import nothing of Triton's at the
top, so that tests can use everything but the last few lines without a server.
"""
