"""An independent, slow, obviously-right TwoTower: one sequence, one token at a time, in numpy.

It shares no code with the package. Tensors are read from the checkpoint's files, the configuration
from its raw ``config.json``. Mamba is the plain recurrence, attention is dense, every expert is
applied by itself. The generation loops follow NVIDIA's ``modeling_nemotron_twotower.py``
(``generate_mask_diffusion``, ``generate_mock_ar``, ``generate_ar``) rule by rule.

Use:

    model = ReferenceModel.load(folder)
    answer = generate_mask_diffusion(model, [5, 6, 7], max_new_tokens=32)
    answer.output_ids, answer.denoiser_calls, answer.masked_counts
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

MASK_ID = 3
Gumbel = Callable[[int, int], np.ndarray]
"""(start of the block in the whole sequence, step) -> noise (block, vocabulary)."""


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def logsumexp(x):
    top = x.max(-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(-1, keepdims=True)))[..., 0]


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rounded_to_bfloat16(x):
    """Rounds float32 to the nearest bfloat16, ties to even, and back."""
    bits = np.array(x, np.float32, ndmin=1).view(np.uint32).astype(np.int64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32).reshape(np.shape(x))


def read_tensors(folder: Path, dtype) -> tuple[dict[str, np.ndarray], str]:
    """Reads all safetensors files by hand; also returns the dtype of most tensors."""
    tensors, kinds = {}, []
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            if entry["dtype"] == "BF16":
                half = np.frombuffer(raw[begin:end], np.uint16)
                values = (half.astype(np.uint32) << 16).view(np.float32)
            else:
                values = np.frombuffer(raw[begin:end], {"F32": np.float32}[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"]).astype(dtype)
            kinds.append(entry["dtype"])
    return tensors, max(set(kinds), key=kinds.count)


@dataclass
class LayerCache:
    """What one layer of the context tower remembers of one sequence."""

    raw: list[np.ndarray] = field(default_factory=list)  # raw xBC vectors, newest last
    state: np.ndarray | None = None  # (heads, head_dim, state)
    keys: list[np.ndarray] = field(default_factory=list)  # (kv_heads, head_dim) each
    values: list[np.ndarray] = field(default_factory=list)


class ReferenceModel:
    """A checkpoint of both towers, computed in ``dtype`` (float64 unless told)."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray], bfloat16: bool):
        self.config, self.tensors, self.bfloat16 = config, tensors, bfloat16
        self.pattern = config["hybrid_override_pattern"]
        self.heads, self.head_dim = config["mamba_num_heads"], config["mamba_head_dim"]
        self.groups, self.state_size = config["n_groups"], config["ssm_state_size"]
        self.inner = self.heads * self.head_dim
        self.dtype = tensors["lm_head.weight"].dtype

    @classmethod
    def load(cls, folder: str | Path, dtype=np.float64) -> ReferenceModel:
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors, kind = read_tensors(Path(folder), dtype)
        return cls(config, tensors, kind == "BF16")

    def new_cache(self) -> list[LayerCache]:
        caches = []
        for kind in self.pattern:
            cache = LayerCache()
            if kind == "M":
                width = self.inner + 2 * self.groups * self.state_size
                cache.raw = [np.zeros(width, self.dtype)] * (self.config["conv_kernel"] - 1)
                cache.state = np.zeros((self.heads, self.head_dim, self.state_size), self.dtype)
            caches.append(cache)
        return caches

    # --- mixers ---------------------------------------------------------------------------------

    def norm(self, x, weight, groups=1):
        parts = x.reshape(*x.shape[:-1], groups, -1)
        epsilon = self.config["layer_norm_epsilon"]
        parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + epsilon)
        return parts.reshape(x.shape) * weight

    def mamba_token(self, w, x, cache: LayerCache):
        """One token through one Mamba layer; changes the cache."""
        projected = w("in_proj.weight") @ x
        conv_dim = len(projected) - self.inner - self.heads
        z, xbc, dt = np.split(projected, [self.inner, self.inner + conv_dim])
        window = [*cache.raw, xbc]
        kernel = w("conv1d.weight")[:, 0, :]
        convolved = w("conv1d.bias").copy()
        for tap, column in enumerate(window):
            convolved += kernel[:, tap] * column
        convolved = silu(convolved)
        cache.raw = window[1:]
        wide = self.groups * self.state_size
        values, b, c = np.split(convolved, [self.inner, self.inner + wide])
        values = values.reshape(self.heads, self.head_dim)
        b, c = b.reshape(self.groups, -1), c.reshape(self.groups, -1)
        dt = softplus(dt + w("dt_bias"))
        shared = self.heads // self.groups  # consecutive heads share b and c
        b, c = np.repeat(b, shared, axis=0), np.repeat(c, shared, axis=0)
        decay = np.exp(-np.exp(w("A_log")) * dt)[:, None, None]
        added = dt[:, None, None] * values[:, :, None] * b[:, None, :]
        cache.state = decay * cache.state + added
        y = (cache.state * c[:, None, :]).sum(-1) + w("D")[:, None] * values
        gated = self.norm(y.reshape(-1) * silu(z), w("norm.weight"), self.groups)
        return w("out_proj.weight") @ gated

    def attention(self, w, x, keys, values):
        """One token's query over all the given keys, (kv_heads, head_dim) each."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        queries = (w("q_proj.weight") @ x).reshape(heads, -1)
        keys, values = np.stack(keys), np.stack(values)
        mixed = np.zeros_like(queries)
        for head, query in enumerate(queries):
            group = head // (heads // kv_heads)
            chances = softmax(keys[:, group] @ query / math.sqrt(len(query)))
            mixed[head] = chances @ values[:, group]
        return w("o_proj.weight") @ mixed.reshape(-1)

    def keys_and_values(self, w, x):
        kv_heads = self.config["num_key_value_heads"]
        return (
            (w("k_proj.weight") @ x).reshape(kv_heads, -1),
            (w("v_proj.weight") @ x).reshape(kv_heads, -1),
        )

    def experts(self, w, x):
        scores = 1 / (1 + np.exp(-(w("gate.weight") @ x)))
        corrected = scores + w("gate.e_score_correction_bias")
        chosen = np.argsort(-corrected, kind="stable")[: self.config["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) + 1e-20 if self.config["norm_topk_prob"] else 1.0

        def expert(name):
            return (
                w(f"{name}.down_proj.weight") @ np.maximum(w(f"{name}.up_proj.weight") @ x, 0) ** 2
            )

        y = expert("shared_experts")
        for e in chosen:
            y = y + scores[e] / total * self.config["routed_scaling_factor"] * expert(
                f"experts.{e}"
            )
        return y

    # --- context tower --------------------------------------------------------------------------

    def weights(self, tower, layer):
        return lambda name: self.tensors[f"{tower}.layers.{layer}.mixer.{name}"]

    def plain_token(self, tower, token, caches) -> np.ndarray:
        """One token through a tower without conditioning; changes the caches; the final hidden."""
        x = self.tensors[f"{tower}.embeddings.weight"][token]
        for layer, (kind, cache) in enumerate(zip(self.pattern, caches, strict=True)):
            w = self.weights(tower, layer)
            h = self.norm(x, self.tensors[f"{tower}.layers.{layer}.norm.weight"])
            if kind == "M":
                h = self.mamba_token(w, h, cache)
            elif kind == "*":
                key, value = self.keys_and_values(w, h)
                cache.keys, cache.values = [*cache.keys, key], [*cache.values, value]
                h = self.attention(w, h, cache.keys, cache.values)
            else:
                h = self.experts(w, h)
            x = x + h
        return self.norm(x, self.tensors[f"{tower}.norm_f.weight"])

    def extend(self, caches, tokens: Sequence[int]) -> np.ndarray | None:
        """Appends tokens to the context; the logits after the last one."""
        logits = None
        for token in tokens:
            hidden = self.plain_token("context_tower", token, caches)
            logits = self.tensors["context_lm_head.weight"] @ hidden
        return logits

    # --- denoiser -------------------------------------------------------------------------------

    def time_embedding(self, t: float) -> np.ndarray:
        """(3, hidden), from the fraction of masked positions."""
        rounded = rounded_to_bfloat16 if self.bfloat16 else np.float32
        angle = np.float32(rounded(np.float32(rounded(np.float32(t))) * np.float32(1000)))
        half = self.tensors["t_embedder.mlp.0.weight"].shape[1] // 2
        steps = np.arange(half, dtype=np.float32)
        exponents = np.float32(-math.log(10000)) * steps / np.float32(half)
        frequencies = np.exp(exponents.astype(np.float64))  # numpy's float32 exp is one unit off
        phases = angle * frequencies.astype(np.float32)
        features = rounded(np.concatenate([np.cos(phases), np.sin(phases)])).astype(self.dtype)
        w = self.tensors
        inner = silu(w["t_embedder.mlp.0.weight"] @ features + w["t_embedder.mlp.0.bias"])
        outer = w["t_embedder.mlp.2.weight"] @ inner + w["t_embedder.mlp.2.bias"]
        return (w["t_block.1.weight"] @ silu(outer) + w["t_block.1.bias"]).reshape(3, -1)

    def denoise(self, caches, block: Sequence[int], t: float) -> np.ndarray:
        """The denoiser's logits (block, vocabulary); the context's caches are only read."""
        embedding = self.time_embedding(t)
        hidden = [self.tensors["denoiser_tower.embeddings.weight"][token] for token in block]
        for layer, (kind, cache) in enumerate(zip(self.pattern, caches, strict=True)):
            w = self.weights("denoiser_tower", layer)
            weight = self.tensors[f"denoiser_tower.layers.{layer}.norm.weight"]
            shift, scale, gate = self.tensors[f"scale_shift_tables.{layer}"] + embedding
            if kind == "E":
                inputs = [self.norm(x, weight) * (1 + scale) + shift for x in hidden]
                outputs = [self.experts(w, x) for x in inputs]
            else:
                inputs = [self.norm(x * (1 + scale) + shift, weight) for x in hidden]
                if kind == "M":
                    seed = copy.copy(cache)  # its fields are replaced, never changed in place
                    outputs = [self.mamba_token(w, x, seed) for x in inputs]
                else:
                    own = [self.keys_and_values(w, x) for x in inputs]
                    keys = [*cache.keys, *(key for key, _ in own)]
                    values = [*cache.values, *(value for _, value in own)]
                    outputs = [self.attention(w, x, keys, values) for x in inputs]
            hidden = [x + gate * y for x, y in zip(hidden, outputs, strict=True)]
        weight = self.tensors["denoiser_tower.norm_f.weight"]
        return np.stack([self.tensors["lm_head.weight"] @ self.norm(x, weight) for x in hidden])

    def mock_step(self, caches, token: int) -> np.ndarray:
        """The denoiser as an autoregressive tower: the logits after ``token``.

        ``caches`` are the context's BEFORE the token; they are only read.
        """
        private = [copy.copy(cache) for cache in caches]
        return self.tensors["lm_head.weight"] @ self.plain_token("denoiser_tower", token, private)


# --- sampling -----------------------------------------------------------------------------------


def refine(
    logits,
    ids,
    threshold,
    steps_left,
    temperature=0.0,
    policy="threshold",
    noise=None,
    mask_id=MASK_ID,
    length=None,
):
    """One step's commits for one row: (new ids, confidences, committed flags, still masked).

    Policy "threshold" is NVIDIA's. "quota" commits the even share, "factor" is Fast-dLLM's dynamic
    threshold, "entropy" the bound of the EB-sampler, "leftmost" the even share from the left.
    """
    logits = np.array(logits, np.float64)
    ids = np.array(ids)
    masked = [int(i) for i in np.flatnonzero(ids == mask_id) if length is None or i < length]
    logits[:, mask_id] = -np.inf
    if not np.isfinite(logits[masked].max(-1)).all():  # a NaN, an infinity, or nothing possible
        return ids, np.full(len(ids), np.inf), np.zeros(len(ids), bool), -1
    chances = softmax(logits)
    scores = logits / temperature + noise if temperature > 0 else logits
    predicted = scores.argmax(-1)
    confidence = np.full(len(ids), np.inf)
    for i in masked:
        confidence[i] = chances[i, predicted[i]]
    order = sorted(masked, key=lambda i: (-confidence[i], -i))
    n, k = len(masked), 0
    if policy == "threshold":
        k = sum(confidence[i] > threshold for i in masked)
    elif policy == "factor":
        k = max(
            (j for j in range(1, n + 1) if (j + 1) * (1 - confidence[order[j - 1]]) < threshold),
            default=0,
        )
    elif policy == "entropy":
        entropies = {
            i: -sum(chance * math.log(chance) for chance in chances[i] if chance > 0)
            for i in masked
        }
        order = sorted(masked, key=lambda i: (entropies[i], -i))
        spent = np.cumsum([0.0, *(entropies[i] for i in order)])
        k = max((j for j in range(1, n + 1) if spent[j - 1] <= threshold), default=0)
    elif policy == "leftmost":
        order = masked
    elif policy != "quota":
        raise ValueError(policy)
    k = n if steps_left <= 1 else min(n, max(k, 1, math.ceil(n / steps_left)))
    committed = np.zeros(len(ids), bool)
    committed[order[:k]] = True
    return np.where(committed, predicted, ids), confidence, committed, n - k


# --- generation ---------------------------------------------------------------------------------


@dataclass
class Answer:
    """The result of a generation loop; ``output_ids`` includes the prompt."""

    output_ids: list[int]
    denoiser_calls: int = 0
    masked_counts: list[list[int]] = field(default_factory=list)  # per block, before each call
    finish_reason: str = "length"


END_ID = 2
"""The end token of every checkpoint that tests make."""


def cut_at_end(answer: Answer, prompt_length: int, eos_ids: Sequence[int]) -> Answer:
    """Return an answer that ends with its end token, where NVIDIA keeps the whole block."""
    new = answer.output_ids[prompt_length:]
    end = next((place for place, token in enumerate(new, 1) if token in eos_ids), None)
    ids = answer.output_ids[:prompt_length] + new[:end]
    return replace(answer, output_ids=ids, finish_reason="length" if end is None else "eos")


def generate_mask_diffusion(
    model: ReferenceModel,
    prompt: Sequence[int],
    max_new_tokens: int = 64,
    block_size: int = 16,
    steps: int = 16,
    threshold: float = 0.9,
    temperature: float = 0.0,
    policy: str = "threshold",
    eos_ids: Sequence[int] = (),
    gumbel: Gumbel | None = None,
) -> Answer:
    """Blocks of masks, refined step by step; the answer is cut to ``max_new_tokens``."""
    caches = model.new_cache()
    model.extend(caches, prompt)
    answer = Answer(list(prompt))
    while len(answer.output_ids) < len(prompt) + max_new_tokens:
        start = len(answer.output_ids)
        block, counts = np.full(block_size, MASK_ID), []
        for step in range(steps):
            n = int((block == MASK_ID).sum())
            if n == 0:
                break
            counts.append(n)
            logits = model.denoise(caches, block, n / block_size)
            noise = gumbel(start, step) if gumbel and temperature > 0 else None
            block, *_ = refine(logits, block, threshold, steps - step, temperature, policy, noise)
        answer.denoiser_calls += len(counts)
        answer.masked_counts.append(counts)
        answer.output_ids += [int(token) for token in block]
        model.extend(caches, block)
        if any(token in eos_ids for token in block):
            answer.finish_reason = "eos"  # the block is kept whole
            break
    del answer.output_ids[len(prompt) + max_new_tokens :]
    return answer


def generate_ar(model, prompt, max_new_tokens=64, eos_ids=(), choose=np.argmax) -> Answer:
    """The context tower alone; ``choose`` maps logits to a token."""
    caches, answer = model.new_cache(), Answer(list(prompt))
    logits = model.extend(caches, prompt)
    for _ in range(max_new_tokens):
        token = int(choose(logits))
        answer.output_ids.append(token)
        if token in eos_ids:
            answer.finish_reason = "eos"
            break
        logits = model.extend(caches, [token])
    return answer


def generate_mock_ar(model, prompt, max_new_tokens=64, eos_ids=(), choose=np.argmax) -> Answer:
    """Both towers token by token: the context stays one token behind, the denoiser reads it."""
    caches, answer = model.new_cache(), Answer(list(prompt))
    model.extend(caches, prompt[:-1])
    for _ in range(max_new_tokens):
        last = answer.output_ids[-1]
        token = int(choose(model.mock_step(caches, last)))
        answer.denoiser_calls += 1
        answer.output_ids.append(token)
        if token in eos_ids:
            answer.finish_reason = "eos"
            break
        model.extend(caches, [last])
    return answer
