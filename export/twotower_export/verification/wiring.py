"""How a main graph joins its layers: whose output each one reads, and which inputs it is given.

A part that is verified on its own gets its hidden states from us, so that it was joined to the
wrong neighbour would not show; nor would lengths that only decide what padding costs. Every value
that a layer takes is therefore traced to where it comes from, by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import TensorProto

from twotower_contract.config import ModelConfig
from twotower_contract.layout import HEADS, Tower, graph_weights
from twotower_export.verification.calls import NEW_STATES, REFINED, RULES, STATES
from twotower_export.verification.graphs import hidden_names

ROWS: Final = {"M": ("lengths",), "*": ("lengths", "context_lengths"), "E": ("lengths",)}
"""Inputs that say how long rows are, which a layer of each kind takes."""

TIME: Final = "denoiser.time_embedding"

_FLOATS: Final = (TensorProto.FLOAT, TensorProto.BFLOAT16)


def wiring_problems(model: onnx.ModelProto, tower: Tower, config: ModelConfig) -> list[str]:
    """Return a sentence for every value that something takes from, or gives to, a wrong place."""
    wires = _Wires.of(model)
    problems = [
        problem
        for index in range(config.num_layers)
        for problem in _layer_problems(wires, tower, config, index)
    ]
    if tower == "denoiser":
        problems += _denoiser_problems(wires, config)
    (last,) = hidden_names(tower, [config.num_layers - 1])
    head = {last, f"{tower}_tower.norm_f.weight", HEADS[tower]}
    if tower == "context":  # of each row's last valid token only
        head.add("lengths")
    found = wires.leaves("logits")
    problems += [f"the head also reads {name}" for name in sorted(found - head)]
    problems += [f"the head does not read {name}" for name in sorted(head - found)]
    return problems


@dataclass(frozen=True)
class _Wires:
    """A main graph by its values.

    Attributes:
        producers: Value -> the node that makes it.
        functions: The functions that nodes call, by name.
    """

    producers: Mapping[str, onnx.NodeProto]
    functions: Mapping[str, onnx.FunctionProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Wires:
        producers = {name: node for node in model.graph.node for name in node.output}
        return cls(producers, {function.name: function for function in model.functions})

    def source(self, value: str) -> str:
        """Return the origin of a value, skipping casts between float types."""
        node = self.producers.get(value)
        while node is not None and node.op_type == "Cast" and node.attribute[0].i in _FLOATS:
            value = node.input[0]
            node = self.producers.get(value)
        return value

    def leaves(self, value: str) -> set[str]:
        """Return the graph inputs and layer outputs that a value is computed from."""
        found, seen, waiting = set[str](), set[str](), [value]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            node = self.producers.get(name)
            if node is None or ".layers." in node.name:
                found.add(name)
            else:
                waiting += node.input
        return found

    def calls(self, node: onnx.NodeProto) -> dict[str, str] | None:
        """Parameter -> where its argument comes from; None where no function is called."""
        function = self.functions.get(node.op_type)
        if function is None or len(function.input) != len(node.input):
            return None
        given = map(self.source, node.input)
        return dict(zip(function.input, given, strict=True))

    def check_call(
        self, what: str, node: onnx.NodeProto | None, wanted: Mapping[str, str]
    ) -> Iterator[str]:
        """Return the arguments of a call that are not those that it should have."""
        given = None if node is None else self.calls(node)
        if given is None:
            yield f"{what} is not a call of a function with its inputs"
            return
        for parameter, source in wanted.items():
            if parameter not in given:
                yield f"{what} takes no `{parameter}`"
            elif given[parameter] != source:
                yield f"{what} takes {given[parameter]} as its `{parameter}`, not {source}"
        for parameter in sorted(given.keys() - wanted):
            yield f"{what} takes `{parameter}` ({given[parameter]}), which it should not"


def _layer_problems(wires: _Wires, tower: Tower, config: ModelConfig, index: int) -> Iterator[str]:
    """Return the faults in the arguments and results of one layer."""
    what, kind = f"{tower}.layers.{index}", config.pattern[index]
    (hidden,) = hidden_names(tower, [index])
    node = wires.producers.get(hidden)
    if node is None or node.name != what:
        yield f"{hidden} is not made by a node {what}"
        return
    embedded = ""
    if index == 0:
        function = wires.functions.get(node.op_type)
        place = (
            list(function.input).index("hidden") if function and "hidden" in function.input else 0
        )
        embedded = wires.source(node.input[place])
        yield from _embedding_problems(wires, tower, embedded)
    before = hidden_names(tower, [index - 1])[0] if index else embedded
    wanted = {"hidden": before, **{row: row for row in ROWS[kind]}}
    wanted |= {state: f"context.layers.{index}.{state}" for state in STATES[kind]}
    if tower == "denoiser":
        wanted |= {"embedding": TIME, "conditioned": "conditioned"}
        wanted["table"] = f"scale_shift_tables.{index}"
    prefix = f"{tower}_tower.layers.{index}."
    weights = [name for name in graph_weights(config, tower) if name.startswith(prefix)]
    wanted |= {name.removeprefix(prefix): name for name in weights}
    yield from wires.check_call(what, node, wanted)
    states = NEW_STATES[tower][kind]
    made = [hidden, *(f"context.layers.{index}.{state}" for state in states)]
    if list(node.output) != made:
        yield f"{what} makes {', '.join(node.output)}, not {', '.join(made)}"


def _embedding_problems(wires: _Wires, tower: Tower, value: str) -> Iterator[str]:
    """Layer 0 reads the rows of the embedding table that the ids name."""
    node = wires.producers.get(value)
    table = f"{tower}_tower.embeddings.weight"
    found = [] if node is None else [node.op_type, *map(wires.source, node.input)]
    if found != ["Gather", table, "ids"] or (node and any(a.i for a in node.attribute)):
        yield f"{tower}.layers.0 reads {value}, which is not {table} gathered by ids"


def _denoiser_problems(wires: _Wires, config: ModelConfig) -> Iterator[str]:
    """Time embedding and refinement."""
    names = [
        n for n in graph_weights(config, "denoiser") if n.startswith(("t_embedder", "t_block"))
    ]
    wanted = {name: name for name in ("ids", "lengths", *names)}
    yield from wires.check_call("denoiser.time", wires.producers.get(TIME), wanted)
    node = wires.producers.get("new_ids")
    wanted = {name: name for name in ("ids", "lengths", *RULES)}
    wanted["logits"] = wires.source("logits")
    yield from wires.check_call("denoiser.refine", node, wanted)
    if node is not None and tuple(node.output) != REFINED:
        yield f"denoiser.refine makes {', '.join(node.output)}, not {', '.join(REFINED)}"
