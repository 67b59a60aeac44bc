"""The argument lists of the plugins' kernels, read by a fake driver as a GPU would read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from twotower_engines.kernels.nodes import OPS

CHAINS = (
    "RefineBlock",
    "Router",
    "SparseExperts",
    "SparseExpertsNVFP4",
    "LinearNVFP4",
    "MambaBlockStep",
    "MambaBlockStepStates",
)
"""Ops with every kind of argument: no scales, and two."""

LAUNCHED = """
import json
from dataclasses import replace
import torch
from tests.support.driver_fake import FakeDriver
from tests.support.plugin_launches import Launcher, TORCH
from tests.support.released_nodes import attributes_of, dtype_of, form_of, tensor_shapes
from twotower_engines.kernels.node import Call
from twotower_engines.kernels.nodes import OPS
from twotower_engines.kernels.spec import Sizes
from twotower_engines.kernels.targets import target

sizes = Sizes(vocab_size=261, hidden=64, inner=64, experts=8, experts_per_token=2, heads=2,
              groups=1)
driver = FakeDriver()
launcher = Launcher(driver, target("9.0"))
made = {}
for node in (node for op in {ops!r} for node in OPS[op].chain):
    form = form_of(node)
    shapes = tensor_shapes(replace(sizes, experts_format=form), 2, 64)
    types = [TORCH[dtype_of(name, form)] for name in node.takes]
    inputs = [torch.empty(shapes[name], dtype=t) for name, t in zip(node.takes, types)]
    outputs = launcher.run(node, inputs, attributes_of(node, sizes))
    again = launcher.run(node, inputs, attributes_of(node, sizes))
    call = driver.launched[-2]
    names = {t.data_ptr(): n for n, t in zip(node.takes, inputs)}
    names |= {t.data_ptr(): n for n, t in zip(node.makes, outputs)}
    made[node.name] = [names.get(value, value) for value in call.arguments]
assert len(driver.modules) == len(set(driver.modules)), "a kernel is loaded once"
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def launched(compiled: Callable[[str], Any]) -> Any:
    """Node name to what a GPU would find at the addresses of its arguments, by name."""
    return compiled(LAUNCHED.replace("{ops!r}", repr(CHAINS)))


@pytest.mark.parametrize("op", CHAINS)
def test_a_kernel_finds_inputs_integers_and_outputs(launched: Any, op: str) -> None:
    for node in OPS[op].chain:
        found = launched[node.name]
        integers = [value for value in found if isinstance(value, int)]
        assert found == [*node.takes, *integers, *node.makes], node.name


def test_integers_are_the_sizes_of_the_call(launched: Any) -> None:
    integers = {name: [v for v in found if isinstance(v, int)] for name, found in launched.items()}
    assert integers["ExpertsUp"] == [2 * 64 * 2]  # pairs
    assert integers["MambaScan"] == [64]
    assert integers["RefineVocabulary"] == [64, 4]  # positions, tiles of a split
    assert integers["ExpertsSum"] == [64]  # tokens that a gate is for
