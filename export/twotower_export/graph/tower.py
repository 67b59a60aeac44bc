"""The graphs of a bundle: context tower, denoiser tower, and the refinement op alone.

Written node by node instead of traced: both towers of the full-size model take a second, every name
is ours, and a tower reads as 52 calls of three layer functions. The PyTorch towers
(`twotower_export.reference.towers`) are the independent reference that they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import onnx_ir as ir

from twotower_contract.config import ModelConfig
from twotower_contract.layout import BANKS, WeightSource, graph_weights
from twotower_contract.quantized import FORMAT_OF_DTYPE, Format, input_forms
from twotower_export.graph.attention import last_valid
from twotower_export.graph.body import DOMAIN, FLOAT, INT32, OPSET, Body, prefixed
from twotower_export.graph.conditioning import WEIGHTS as TIME_WEIGHTS
from twotower_export.graph.conditioning import time_embedding
from twotower_export.graph.descriptions import BLOCK_IDS, FORMS, describe, describe_weight
from twotower_export.graph.layers import (
    FLOAT_WEIGHTS,
    KINDS,
    LayerFunctions,
    layer_functions,
    weight_suffixes,
)
from twotower_export.graph.quantized_weights import decoder, from_fp8
from twotower_export.graph.refine import ROW_INPUTS, refine_block

IR_VERSION = 10
DTYPES = {"bfloat16": ir.DataType.BFLOAT16, "float32": ir.DataType.FLOAT}
STORED = {"BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}
CODED = {"F8_E4M3": ir.DataType.FLOAT8E4M3FN, "I32": INT32}
ROW_FLOATS = ("threshold", "temperature")

Dtype = Literal["bfloat16", "float32"]
Shape = Sequence[int | str]


class _Graph:
    """A main graph while it is written: its body, its inputs by name, its outputs.

    Args:
        length: Name of the dimension that counts the tokens of a call.
        group: Weights of a row that share a scale in `int4`.
        flat_banks: See `build_context_graph`.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: Dtype,
        weight_dtypes: Mapping[str, str],
        length: str,
        group: int = 0,
        flat_banks: bool = True,
    ) -> None:
        self.config = config
        self.dtype = DTYPES[dtype]
        self.body = Body(self.dtype)
        self.inputs: dict[str, ir.Value] = {}
        self.outputs: list[ir.Value] = []
        c = config
        cache: Shape = ["batch", c.num_key_value_heads, "context", c.head_dim]
        ssm: Shape = ["batch", c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size]
        self._states: dict[str, tuple[Shape, ir.DataType]] = {
            "conv_state": (["batch", c.conv_kernel - 1, c.conv_dim], self.dtype),
            "ssm_state": (ssm, FLOAT),
            "k_cache": (cache, self.dtype),
            "v_cache": (cache, self.dtype),
            "queries": (["batch", c.num_attention_heads, length, c.head_dim], self.dtype),
        }
        self.decoders: dict[Format, ir.Function] = {}
        self._weight_dtypes, self._group, self._flat_banks = weight_dtypes, group, flat_banks
        self._weights: dict[str, ir.Value] = {}

    def input(
        self, name: str, shape: Shape, dtype: ir.DataType, doc: str | None = None
    ) -> ir.Value:
        value = ir.val(name, dtype, shape)
        value.doc_string = _documented(shape, dtype, doc or describe(name))
        self.inputs[name] = value
        return value

    def output(
        self,
        value: ir.Value,
        name: str,
        shape: Shape,
        dtype: ir.DataType,
        doc: str | None = None,
    ) -> None:
        value.name = name
        value.shape = ir.Shape(shape)
        value.type = ir.TensorType(dtype)
        value.doc_string = _documented(shape, dtype, doc or describe(name))
        self.outputs.append(value)

    def add_weights(self, tower: Literal["context", "denoiser"]) -> None:
        """Add inputs for all weights of a tower, each cast to T where it is stored otherwise."""
        for name, source in graph_weights(self.config, tower).items():
            self.body.begin(name)
            format_ = FORMAT_OF_DTYPE.get(self._weight_dtypes[name])
            if format_ is not None:
                self._weights[name] = self._decoded(name, source, format_)
                continue
            stored = FLOAT if source.how == "widen" else STORED[self._weight_dtypes[name]]
            value = self.input(name, source.shape, stored, describe_weight(source))
            if stored != self.dtype and not name.endswith(FLOAT_WEIGHTS):
                value = self.body.cast(value, self.dtype)
            self._weights[name] = value

    def _decoded(self, name: str, source: WeightSource, format_: Format) -> ir.Value:
        """Add the inputs of a quantized matrix or of a bank of them; return its weights in T."""
        dtype = self._weight_dtypes[name]
        computed = "F32" if self.dtype == FLOAT else "BF16"
        given = [
            self.input(one, shape, CODED.get(kind) or STORED[kind], describe_weight(source, part))
            for part, (one, (kind, shape)) in zip(
                FORMS[format_],
                input_forms(name, dtype, source.shape, computed, self._group).items(),
                strict=True,
            )
        ]
        if format_ == "fp8":
            return from_fp8(self.body, *given)
        if format_ not in self.decoders:
            self.decoders[format_] = decoder(format_, self.dtype)
        return self.body.call(self.decoders[format_], given)[0]

    def weight(self, name: str) -> ir.Value:
        return self._weights[name]

    def layer_functions(self, *, denoiser: bool) -> LayerFunctions:
        dtypes = (self._weight_dtypes[one] for one in self._weights if one.endswith(BANKS))
        is_flat = self._flat_banks and not any(dtype in FORMAT_OF_DTYPE for dtype in dtypes)
        return layer_functions(self.config, self.dtype, denoiser=denoiser, flat_banks=is_flat)

    def layer_weights(self, tower: str, index: int) -> list[ir.Value]:
        kind = self.config.pattern[index]
        return [self.weight(f"{tower}.layers.{index}.{name}") for name in weight_suffixes(kind)]

    def add_states(self) -> dict[int, list[ir.Value]]:
        """Add inputs for the context's states, by layer."""
        return {
            index: [
                self.input(f"context.layers.{index}.{state}", *self._states[state])
                for state in KINDS[kind].states
            ]
            for index, kind in enumerate(self.config.pattern)
        }

    def add_new_states(self, index: int, values: Mapping[str, ir.Value]) -> None:
        """Add outputs of a layer: each is a state as it is after the call, of the same shape."""
        for name, value in values.items():
            shape = self._states[name.removesuffix("_new")]
            self.output(value, f"context.layers.{index}.{name}", *shape)

    def model(
        self, name: str, functions: Sequence[ir.Function], doc: str, metadata: Mapping[str, str]
    ) -> ir.Model:
        graph = ir.Graph(
            list(self.inputs.values()),
            self.outputs,
            nodes=prefixed(self.body.op.tape.nodes, name),
            opset_imports={"": OPSET, DOMAIN: 1},
            name=name,
            doc_string=doc,
        )
        return ir.Model(
            graph,
            ir_version=IR_VERSION,
            producer_name="twotower",
            producer_version=metadata.get("twotower_version"),
            functions=functions,
            metadata_props=dict(metadata),
            doc_string=doc,
        )


def _documented(shape: Shape, dtype: ir.DataType, doc: str) -> str:
    """Return a doc string: shape and dtype, then the meaning."""
    return f"[{', '.join(map(str, shape))}] {dtype.name.lower()}. {doc}"


def build_context_graph(
    config: ModelConfig,
    dtype: Dtype,
    weight_dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
    group: int = 0,
    *,
    flat_banks: bool = True,
) -> ir.Model:
    """One graph for prefill, block extension and the autoregressive step.

    NVIDIA's `_build_context_cache` and `_extend_context_cache` (`modeling_nemotron_twotower.py`).
    The former runs all tokens but the last, keeps the Mamba states for mock-AR (`mamba_s2`), and
    then runs the last: here, whoever wants those states extends by the last token alone. Attention
    is causal inside a call and sees the whole context; there are no positions, no masks of padding
    beyond `lengths`, and no time conditioning.

    Inputs: ids [batch, tokens] int32; lengths [batch] int32, the valid tokens of this call;
    context_lengths [batch] int32; states `context.layers.{i}.{conv_state|ssm_state|k_cache|
    v_cache}`; weights by their names in the checkpoint.
    Outputs: logits [batch, vocab] float32 of each row's last valid token; the new states, in which
    the caches are those that came in with this call's keys and values written into them.

    Args:
        dtype: Dtype that the graph computes in.
        weight_dtypes: The stored dtype of each weight, as safetensors spells it.
        metadata: Written into the file.
        group: Weights of a row that share a scale in `int4`.
        flat_banks: Whether the body of the experts may multiply with a whole bank at once. With
            quantized banks it never does, nor in the float32 graph beside them, so that the two
            can be compared.
    """
    g = _Graph(config, dtype, weight_dtypes, "tokens", group, flat_banks)
    b = g.body
    ids = g.input("ids", ["batch", "tokens"], INT32)
    rows = {name: g.input(name, ["batch"], INT32) for name in ("lengths", "context_lengths")}
    states = g.add_states()
    g.add_weights("context")
    layers = g.layer_functions(denoiser=False)

    b.begin("embeddings")
    hidden: ir.Value = b.op.Gather(g.weight("context_tower.embeddings.weight"), ids)
    for index, kind in enumerate(config.pattern):
        letter, name = KINDS[kind], f"context.layers.{index}"
        given = [hidden, *states[index], *(rows[row] for row in letter.row_inputs)]
        outputs = [f"{name}.hidden", *(f"{name}.{output}" for output in letter.outputs)]
        weights = g.layer_weights("context_tower", index)
        hidden, *new = b.call(layers.by_kind[kind], [*given, *weights], name, outputs)
        g.add_new_states(index, dict(zip(letter.outputs, new, strict=True)))

    b.begin("last")
    last = b.unsqueeze(last_valid(b, hidden, rows["lengths"]), 1)
    b.begin("norm_f")
    (normed,) = b.call(layers.norm, [last, g.weight("context_tower.norm_f.weight")])
    b.begin("head")
    # The product is rounded to T and only then float32, as `_forward_tower_with_cache` does: equal
    # logits of different tokens are possible.
    logits = b.up(
        b.linear(normed, g.weight("context_lm_head.weight"), config.hidden_size, config.vocab_size)
    )
    logits = b.reshape(logits, 0, config.vocab_size)
    meaning = "Logits of the token after each row's last valid one."
    g.output(logits, "logits", ["batch", config.vocab_size], FLOAT, meaning)
    g.outputs.insert(0, g.outputs.pop())
    doc = "Context tower: tokens and states in, new states and the last token's logits out."
    return g.model("context", [*g.decoders.values(), *layers.all], doc, metadata)


def build_denoiser_graph(
    config: ModelConfig,
    dtype: Dtype,
    weight_dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
    group: int = 0,
    *,
    flat_banks: bool = True,
) -> ir.Model:
    """One denoise step over a block, from block ids to block ids.

    NVIDIA's `_run_denoiser_step_diffusion`, then one step of `generate_mask_diffusion`; with
    conditioned 0, `_run_denoiser_step_mock_ar` (`modeling_nemotron_twotower.py`). The states are
    the context tower's of the same layer (`_build_denoiser_cache_diffusion`), computed with its
    weights; nothing of the block is kept.

    Inputs: ids [batch, block] int32; per row: lengths, context_lengths, conditioned (1: with time
    conditioning; 0: a plain pass, for mock-AR), threshold, steps_left, temperature, policy, seed
    (see `refine.refine_block`); the context's states, which are only read; weights.
    Outputs: new_ids, confidence, committed, still_masked, and logits [batch, block, vocab] T,
    which mock-AR reads: wider they would be written a second time, 8 MB for each row.
    Arguments as of `build_context_graph`.
    """
    g = _Graph(config, dtype, weight_dtypes, "block", group, flat_banks)
    b = g.body
    ids = g.input("ids", ["batch", "block"], INT32, BLOCK_IDS)
    rows = {
        name: g.input(name, ["batch"], FLOAT if name in ROW_FLOATS else INT32)
        for name in ("context_lengths", "conditioned", *ROW_INPUTS)
    }
    states = g.add_states()
    g.add_weights("denoiser")
    layers = g.layer_functions(denoiser=True)
    mask_id = config.mask_token_id
    time = time_embedding(config, g.dtype, DTYPES[config.dtype], mask_id)
    refine = refine_block(mask_id, g.dtype)

    b.begin("time")
    weights = [g.weight(name) for name in TIME_WEIGHTS]
    (embedding,) = b.call(
        time, [ids, rows["lengths"], *weights], "denoiser.time", ["denoiser.time_embedding"]
    )
    b.begin("embeddings")
    hidden: ir.Value = b.op.Gather(g.weight("denoiser_tower.embeddings.weight"), ids)
    written: list[dict[str, ir.Value]] = []
    for index, kind in enumerate(config.pattern):
        letter, name = KINDS[kind], f"denoiser.layers.{index}"
        given = [hidden, embedding, rows["conditioned"], *states[index]]
        given += [rows[row] for row in letter.row_inputs]
        given += [g.weight(f"scale_shift_tables.{index}")]
        given += g.layer_weights("denoiser_tower", index)
        outputs = [f"{name}.hidden", *(f"context.layers.{index}.{o}" for o in letter.in_place)]
        hidden, *new = b.call(layers.by_kind[kind], given, name, outputs)
        written.append(dict(zip(letter.in_place, new, strict=True)))

    b.begin("norm_f")
    (normed,) = b.call(layers.norm, [hidden, g.weight("denoiser_tower.norm_f.weight")])
    b.begin("head")
    logits = b.linear(normed, g.weight("lm_head.weight"), config.hidden_size, config.vocab_size)
    refined = b.call(refine, [logits, ids, *(rows[row] for row in ROW_INPUTS)], "denoiser.refine")
    _add_refined(g, refined)
    meaning = "Logits of each position's own token, in the dtype that they were computed in."
    g.output(logits, "logits", ["batch", "block", config.vocab_size], g.dtype, meaning)
    for index, values in enumerate(written):
        g.add_new_states(index, values)
    doc = "Denoiser tower: one refinement step of a block against the context's states."
    functions = [*g.decoders.values(), *layers.all, time, refine]
    return g.model("denoiser", functions, doc, metadata)


def build_refine_graph(
    config: ModelConfig,
    dtype: Dtype,
    weight_dtypes: Mapping[str, str],
    metadata: Mapping[str, str],
) -> ir.Model:
    """`twotower::RefineBlock` alone, for tests and benchmarks; logits come as float32."""
    g = _Graph(config, dtype, weight_dtypes, "block")
    shape: Shape = ["batch", "block", config.vocab_size]
    logits = g.input("logits", shape, FLOAT, "Logits of each position's own token.")
    ids = g.input("ids", ["batch", "block"], INT32, BLOCK_IDS)
    rows = [g.input(name, ["batch"], FLOAT if name in ROW_FLOATS else INT32) for name in ROW_INPUTS]
    refine = refine_block(config.mask_token_id, g.dtype)
    _add_refined(g, g.body.call(refine, [logits, ids, *rows], "refine"))
    return g.model("refine", [refine], "The refinement op alone.", metadata)


def _add_refined(g: _Graph, refined: Sequence[ir.Value]) -> None:
    new_ids, confidence, committed, still_masked = refined
    g.output(new_ids, "new_ids", ["batch", "block"], INT32)
    g.output(confidence, "confidence", ["batch", "block"], FLOAT)
    g.output(committed, "committed", ["batch", "block"], INT32)
    g.output(still_masked, "still_masked", ["batch"], INT32)
