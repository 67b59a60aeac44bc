"""Kernels of the four ops, in the Triton language, one op per file.

- `refine`: `RefineBlock`, from a block's logits to its next ids;
- `router`: `Router`, from a layer's tokens to their experts;
- `experts`: `SparseExperts`, the routed experts and no others, and the layer's residual;
- `mamba`: `MambaBlockStep`, convolution, scan and gated norm of one block.

Each file has its kernels, a table of their launch configurations, and the specifications that
`compile` turns into PTX for a GPU that is not there (`targets`). TensorRT launches them as plugins
(`nodes`). The semantics are those of the ONNX functions of the same names in a bundle's
graphs. With `TRITON_INTERPRET=1` in the environment, set before this package is imported, the same
kernels run on a CPU, and that is how the tests check them.

Importing this package loads nothing heavy; importing one of its modules loads the compiler.
"""
