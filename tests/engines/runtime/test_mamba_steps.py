"""The Mamba step of the CPU flavour against the exported one, value for value."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.runtime.mamba_steps import replace_mamba_steps, scan_width
from twotower_engines.runtime.pruning import flat_graph

B, L = 3, 9


@pytest.fixture(scope="module", params=[{}, {"mamba_head_dim": 32, "ssm_state_size": 7}])
def steps(request, random_engines):
    """The first step of a graph, as it is exported and in a CPU's operators; and sizes."""
    made = random_engines("ME", seed=4, **request.param)
    model = flat_graph(made.folder / "context.onnx")
    node = next(node for node in model.graph.node if node.op_type == "MambaBlockStep")
    config = made.engines.manifest.model
    heads, width, state = config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size
    sizes = [
        *([B, L, config.d_inner + config.conv_dim + heads], [B, 3, config.conv_dim]),
        *([B, heads, width, state], [B], [config.conv_dim, 4], [config.conv_dim]),
        *([heads], [heads], [heads], [config.d_inner]),
    ]
    kinds = [6 if size == [B] else 1 for size in sizes]
    values = map(helper.make_tensor_value_info, node.input, kinds, sizes)
    results = [helper.make_tensor_value_info(name, 1, None) for name in node.output]
    del model.graph.node[:], model.graph.input[:], model.graph.output[:]
    model.graph.node.append(node)
    model.graph.input.extend(values)
    model.graph.output.extend(results)
    for result in model.graph.output:
        result.type.tensor_type.shape.dim.extend(
            onnx.TensorShapeProto.Dimension() for _ in range(4 - ("conv" in result.name))
        )
    del model.graph.output[0].type.tensor_type.shape.dim[3:]
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    replace_mamba_steps(ours.graph)
    del ours.functions[:]
    sessions = [
        import_onnxruntime().InferenceSession(one.SerializeToString(), providers=PROVIDERS)
        for one in (model, ours)
    ]
    return sessions, list(node.input), sizes, width


PROVIDERS = ["CPUExecutionProvider"]


def test_rows_of_any_length_give_the_same_values_and_states(steps):
    (exported, ours), names, sizes, width = steps
    draw = np.random.default_rng(0)
    given = [draw.standard_normal(size).astype(np.float32) for size in sizes]
    given[3] = np.array([L, 4, 1], np.int32)
    y, columns, state = exported.run(None, dict(zip(names, given, strict=True)))
    wide = np.zeros((*given[2].shape[:2], given[2].shape[3], scan_width(width)), np.float32)
    wide[..., :width] = given[2].transpose(0, 1, 3, 2)
    given[2] = wide
    found, found_columns, found_state = ours.run(None, dict(zip(names, given, strict=True)))
    for row, length in enumerate(given[3]):
        np.testing.assert_allclose(found[row, :length], y[row, :length], atol=1e-4)
    np.testing.assert_array_equal(found_columns, columns)
    turned = found_state.transpose(0, 1, 3, 2)
    np.testing.assert_allclose(turned[:, :, :width], state, atol=1e-4)
    assert not turned[:, :, width:].any()  # or the columns would not stay zero
