"""The PyTorch towers against the independent model, transformers' own class, and themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.reference import ReferenceModel, generate_mask_diffusion, rounded_to_bfloat16
from tests.support.torch_generation import generate, load_towers
from twotower_contract.layout import expected_tensors
from twotower_export.reference.mixers import selective_scan
from twotower_export.reference.towers import (
    ContextTower,
    Denoiser,
    Towers,
    advance_states,
    empty_states,
)
from twotower_export.tiny.checkpoints import random_tensors, tiny_config, write_random_checkpoint

MASK = 3
ODD_SIZES = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 5,
    "mamba_num_heads": 6,
    "mamba_head_dim": 7,
    "n_groups": 3,
    "ssm_state_size": 9,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 19,
    "shared_intermediate_size": 23,
    "vocab_size": 301,
}


def draw_ids(seed, *shape, vocabulary=301):
    return torch.from_numpy(np.random.default_rng(seed).integers(4, vocabulary, shape))


def whole(ids):
    return torch.full((len(ids),), ids.shape[1])


@torch.no_grad()
def feed(towers, pieces, capacity=64, dtype=torch.float32):
    """Runs the context tower over pieces of ids; the last logits, states and context lengths."""
    states = empty_states(towers.config, len(pieces[0]), capacity, dtype)
    past = torch.zeros(len(pieces[0]), dtype=torch.long)
    for ids in pieces:
        logits, emitted = towers.context(ids, whole(ids), past, states)
        states = advance_states(states, emitted, whole(ids), past)
        past = past + ids.shape[1]
    return logits, states, past


@torch.no_grad()
def denoise(towers, block, past, states, conditioned=1):
    flags = torch.full((len(block),), conditioned)
    return towers.denoiser(block, whole(block), past, flags, states)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A checkpoint of odd sizes, with its PyTorch towers and its independent model."""
    folder = tmp_path_factory.mktemp("odd")
    write_random_checkpoint(folder, "*EMME*M", hidden=22, seed=5, **ODD_SIZES)
    return load_towers(folder), ReferenceModel.load(folder)


@pytest.fixture(scope="module")
def random_towers():
    """Towers of random float32 weights, made without files."""

    def make(pattern="MEM*E", seed=0, dtype=torch.float32, **sizes):
        config = tiny_config(pattern, 24, "float32", **{"vocab_size": 301, **sizes})
        towers = Towers(config, ContextTower(config), Denoiser(config))
        tensors = random_tensors(config, seed)
        for tower in (towers.context, towers.denoiser):
            tower.load_state_dict({name: tensors[name] for name in tower.state_dict()})
            tower.requires_grad_(False).to(dtype)
        return towers

    return make


def denoiser_as_context(towers):
    """Gives the denoiser the context tower's weights and conditioning that changes nothing."""
    denoiser = towers.denoiser
    denoiser.denoiser_tower.load_state_dict(towers.context.context_tower.state_dict())
    denoiser.lm_head.load_state_dict(towers.context.context_lm_head.state_dict())
    for parameter in denoiser.t_block.parameters():
        parameter.data.zero_()
    for table in denoiser.scale_shift_tables:
        table.data.copy_(torch.tensor([0.0, 0.0, 1.0])[:, None].expand_as(table))
    return towers


# --- against the independent model --------------------------------------------------------------


def test_context_tower_is_the_plain_recurrence(odd):
    towers, model = odd
    ids = draw_ids(0, 1, 37)
    caches = model.new_cache()
    expected = model.extend(caches, ids[0].tolist())
    logits, states, _ = feed(towers, [ids])
    assert np.abs(logits[0].numpy() - expected).max() < 1e-4 * np.abs(expected).max()
    for layer, (kind, cache) in enumerate(zip(model.pattern, caches, strict=True)):
        name = f"context.layers.{layer}."
        if kind == "M":
            assert np.allclose(states[name + "ssm_state"][0], cache.state, atol=1e-4)
            assert np.allclose(states[name + "conv_state"][0], np.stack(cache.raw), atol=1e-4)
        elif kind == "*":
            keys = states[name + "k_cache"][0, :, :37].transpose(0, 1)
            values = states[name + "v_cache"][0, :, :37].transpose(0, 1)
            assert np.allclose(keys, np.stack(cache.keys), atol=1e-4)
            assert np.allclose(values, np.stack(cache.values), atol=1e-4)


@pytest.mark.parametrize("masked", [1, 4, 15, 16])
def test_denoiser_is_the_plain_recurrence(odd, masked):
    towers, model = odd
    ids, block = draw_ids(1, 1, 21), draw_ids(2, 1, 16)
    block[0, np.random.default_rng(masked).permutation(16)[:masked]] = MASK
    caches = model.new_cache()
    model.extend(caches, ids[0].tolist())
    expected = model.denoise(caches, block[0].tolist(), masked / 16)
    _, states, past = feed(towers, [ids])
    logits = denoise(towers, block, past, states)[0].numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_unconditioned_step_is_the_mock_autoregressive_one(odd):
    towers, model = odd
    ids = draw_ids(3, 1, 12)
    caches = model.new_cache()
    model.extend(caches, ids[0, :-1].tolist())
    expected = model.mock_step(caches, int(ids[0, -1]))
    _, states, past = feed(towers, [ids[:, :-1]])
    logits = denoise(towers, ids[:, -1:], past, states, conditioned=0)[0, 0].numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_generation_of_both_models_agrees(tmp_path):
    """Token by token, also where a threshold lets several commit at once."""
    write_random_checkpoint(tmp_path, "ME*M", hidden=16, seed=3, logit_scale=8.0, vocab_size=280)
    towers, model = load_towers(tmp_path), ReferenceModel.load(tmp_path)
    prompts = [draw_ids(row, n, vocabulary=280).tolist() for row, n in enumerate((1, 2, 9, 30))]
    answers, _ = generate(towers, prompts, max_new_tokens=32, threshold=0.6)
    calls = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = generate_mask_diffusion(model, prompt, 32, threshold=0.6, eos_ids=(2,))
        assert answer == expected.output_ids[len(prompt) :][: len(answer)]
        calls += expected.denoiser_calls
    assert calls < 4 * 32, "no block committed two tokens in one call: the threshold was not tried"


# --- against transformers -----------------------------------------------------------------------


def test_context_tower_is_transformers_nemotron_h(random_towers):
    """In float32, and with a time step bound that no step reaches, the two agree.

    Otherwise transformers clamps the time step from below, and rounds inside its gated norm.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    towers = random_towers("MEM*EM", seed=2)
    config = towers.config
    theirs = NemotronHForCausalLM(
        NemotronHConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=len(config.pattern),
            hybrid_override_pattern=config.pattern,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            mamba_num_heads=config.mamba_num_heads,
            mamba_head_dim=config.mamba_head_dim,
            n_groups=config.n_groups,
            ssm_state_size=config.ssm_state_size,
            conv_kernel=config.conv_kernel,
            chunk_size=16,
            n_routed_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            moe_intermediate_size=config.moe_intermediate_size,
            moe_shared_expert_intermediate_size=config.shared_intermediate_size,
            n_shared_experts=1,
            routed_scaling_factor=config.routed_scaling_factor,
            norm_topk_prob=True,
            n_group=1,
            topk_group=1,
            layer_norm_epsilon=config.norm_eps,
            time_step_min=1e-9,
            time_step_limit=(0.0, float("inf")),
            use_conv_bias=True,
            use_bias=False,
            mamba_proj_bias=False,
            attention_bias=False,
            mlp_bias=False,
            mlp_hidden_act="relu2",
            tie_word_embeddings=False,
        )
    ).eval()
    own = towers.context.state_dict()
    renamed = {}
    for name in theirs.state_dict():
        source = name.replace("model.", "context_tower.", 1)
        if name == "lm_head.weight":
            source = "context_lm_head.weight"
        if source in own:
            renamed[name] = own[source]
        else:  # their experts are stacked
            prefix, part = source.split("experts.")
            count = config.num_experts
            pieces = [own[f"{prefix}experts.{e}.{part}.weight"] for e in range(count)]
            renamed[name] = torch.stack(pieces)
    theirs.load_state_dict(renamed)
    ids = draw_ids(4, 2, 29)
    with torch.no_grad():
        expected = theirs(ids, use_cache=False).logits[:, -1]
    logits, _, _ = feed(towers, [ids])
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


# --- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[16, 16], [1, 31], [31, 1], [5, 2, 1, 24], [1] * 32])
def test_prefill_in_one_piece_is_any_split(random_towers, cuts):
    towers = random_towers()
    ids = draw_ids(6, 2, 32)
    once, states_once, _ = feed(towers, [ids])
    split, states_split, _ = feed(towers, list(ids.split(cuts, dim=1)))
    assert torch.allclose(once, split, atol=2e-4)
    assert states_once.keys() == states_split.keys()
    for name, state in states_once.items():
        assert torch.allclose(state, states_split[name], atol=1e-4), name


def test_ragged_rows_are_the_rows_alone(random_towers):
    """Padding, stale cache contents and inactive rows leave no trace."""
    towers = random_towers()
    ids, past_ids = draw_ids(7, 4, 12), draw_ids(8, 4, 10)
    lengths, past = torch.tensor([12, 5, 1, 0]), torch.tensor([10, 0, 7, 4])
    alone = [feed(towers, [past_ids[r : r + 1, :n]]) for r, n in enumerate(past) if n]
    states = empty_states(towers.config, 4, 64, torch.float32)
    for row, (_, own, _) in zip([0, 2, 3], alone, strict=True):
        for name in states:
            states[name][row] = own[name][0]
    for name, state in states.items():
        if name.endswith("_cache"):
            for row, n in enumerate(past.tolist()):
                state[row, :, n:] = 7.7  # stale
    with torch.no_grad():
        logits, emitted = towers.context(ids, lengths, past, states)
    advanced = advance_states(states, emitted, lengths, past)
    for row in (0, 1, 2):
        pieces = [past_ids[row : row + 1, : past[row]], ids[row : row + 1, : lengths[row]]]
        expected, own, _ = feed(towers, [piece for piece in pieces if piece.shape[1]])
        assert torch.allclose(logits[row], expected[0], atol=1e-4)
        used = int(past[row] + lengths[row])
        for name, state in own.items():
            got = advanced[name][row]
            got, state = (got[:, :used], state[0][:, :used]) if "cache" in name else (got, state[0])
            assert torch.allclose(got, state, atol=1e-4), (row, name)
    for name, state in advanced.items():
        assert torch.equal(state[3], states[name][3]), f"inactive row changed {name}"


def test_ragged_blocks_are_the_blocks_alone(random_towers):
    towers = random_towers()
    _, states, past = feed(towers, [draw_ids(9, 3, 11)])
    block = draw_ids(10, 3, 16)
    block[:, ::3] = MASK
    lengths, flags = torch.tensor([16, 7, 1]), torch.tensor([1, 1, 0])
    with torch.no_grad():
        together = towers.denoiser(block, lengths, past, flags, states)
        for row, n in enumerate(lengths.tolist()):
            own = {name: state[row : row + 1] for name, state in states.items()}
            alone = towers.denoiser(
                block[row : row + 1, :n],
                lengths[row : row + 1],
                past[:1],
                flags[row : row + 1],
                own,
            )
            assert torch.allclose(together[row, :n], alone[0], atol=1e-4)


def test_neutral_conditioning_of_the_same_weights_is_the_next_step(random_towers):
    """One token: the denoiser with gate 1, shift 0, scale 0 is the context tower's next step."""
    towers = denoiser_as_context(random_towers())
    ids = draw_ids(11, 2, 20)
    expected, _, _ = feed(towers, [ids])
    _, states, past = feed(towers, [ids[:, :-1]])
    for conditioned in (0, 1):
        logits = denoise(towers, ids[:, -1:], past, states, conditioned)[:, 0]
        assert torch.allclose(logits, expected, atol=1e-4)


def test_only_attention_looks_ahead(random_towers):
    """Without attention a neutral denoiser is causal; with it, later tokens change earlier ones."""
    for pattern, causal in (("MEME", True), ("M*E", False)):
        towers = denoiser_as_context(random_towers(pattern))
        ids, block = draw_ids(12, 1, 9), draw_ids(13, 1, 6)
        _, states, past = feed(towers, [ids])
        with torch.no_grad():
            hidden, _ = towers.context.every_position(block, whole(block), past, states)
        expected = towers.context.context_lm_head(hidden)
        logits = denoise(towers, block, past, states)
        assert torch.allclose(logits, expected, atol=1e-4) == causal
        plain = denoise(towers, block, past, states, conditioned=0)
        assert torch.allclose(plain, expected, atol=1e-4)
        changed = block.clone()
        changed[0, -1] = 5
        same = torch.allclose(denoise(towers, changed, past, states)[0, 0], logits[0, 0], atol=1e-5)
        assert same == causal


def test_seeds_are_only_read(random_towers):
    towers = random_towers()
    _, states, past = feed(towers, [draw_ids(14, 2, 9)])
    before = {name: state.clone() for name, state in states.items()}
    block = torch.full((2, 16), MASK)
    first = denoise(towers, block, past, states)
    assert torch.equal(first, denoise(towers, block, past, states))
    assert all(torch.equal(before[name], state) for name, state in states.items())


def test_order_of_the_cache_does_not_matter_but_order_of_the_block_does(random_towers):
    """There are no positions: keys may be permuted; Mamba, though, sees the block's order."""
    towers = random_towers("M*E")
    _, states, past = feed(towers, [draw_ids(15, 1, 13)])
    block = draw_ids(16, 1, 8)
    logits = denoise(towers, block, past, states)
    order = torch.from_numpy(np.random.default_rng(0).permutation(13))
    shuffled = {
        name: torch.cat([state[:, :, order], state[:, :, 13:]], dim=2) if "cache" in name else state
        for name, state in states.items()
    }
    assert torch.allclose(denoise(towers, block, past, shuffled), logits, atol=1e-4)
    turned = denoise(towers, block.flip(1), past, states).flip(1)
    assert not torch.allclose(turned, logits, atol=1e-2)


def test_time_matters_and_is_rounded_as_the_checkpoint(odd):
    """15/16 x 1000 is 936 in bfloat16, also when a bfloat16 checkpoint runs in float32."""
    towers, model = odd
    denoiser = towers.denoiser
    t = torch.arange(1, 17) / 16
    modulation = denoiser.modulation(t, torch.ones(16))
    for k in (1, 9, 15, 16):
        expected = model.tensors["scale_shift_tables.3"] + model.time_embedding(k / 16)
        assert np.allclose(modulation[3][k - 1].detach(), expected, atol=1e-5)
    angles = [float(rounded_to_bfloat16(np.float32(k / 16 * 1000))) for k in range(1, 17)]
    assert angles[14] == 936.0
    assert angles[:4] == [62.5, 125.0, 188.0, 250.0]
    embedder = denoiser.t_embedder
    rounded = embedder(t[14:15], torch.bfloat16, torch.float32)
    exact = embedder(t[14:15], torch.float32, torch.float32)
    assert (rounded - exact).abs().max() > 0.05


def test_masked_fraction_counts_valid_positions_of_each_row(random_towers):
    denoiser = random_towers("M").denoiser
    ids = torch.tensor([[3, 5, 3, 3], [3, 3, 3, 3], [5, 5, 5, 5], [3, 3, 3, 3]])
    fractions = denoiser.masked_fraction(ids, torch.tensor([4, 2, 4, 0]))
    assert fractions.tolist() == [0.75, 1.0, 0.0, 0.0]


def test_correction_selects_but_does_not_weigh(random_towers):
    towers = random_towers("E", num_experts=6, num_experts_per_tok=2)
    router = towers.context.context_tower.layers[0].mixer.gate
    router.e_score_correction_bias.zero_()
    router.e_score_correction_bias[4] = 10.0
    x = torch.randn(30, 24, generator=torch.Generator().manual_seed(0))
    indices, weights = router(x)
    assert (indices[:, 0] == 4).all()
    scores = (x @ router.weight.T).sigmoid()
    expected = scores.gather(1, indices)
    expected = expected / expected.sum(-1, keepdim=True) * towers.config.routed_scaling_factor
    assert torch.allclose(weights, expected, atol=1e-6)


def test_equal_scores_go_to_the_lower_expert(random_towers):
    router = random_towers("E").context.context_tower.layers[0].mixer.gate
    router.weight.zero_()
    router.e_score_correction_bias.zero_()
    indices, _ = router(torch.ones(3, 24))
    assert indices.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("chunk", [1, 5, 16, 64])
def test_scan_with_large_seeds_is_the_recurrence(chunk):
    """Seeds of magnitude 1e3, as long contexts produce them."""
    draw = np.random.default_rng(0)
    batch, length, heads, width, groups, size = 2, 33, 4, 3, 2, 5
    x = draw.normal(size=(batch, length, heads, width))
    dt = draw.uniform(0.001, 0.3, (batch, length, heads))
    a = -draw.uniform(1, 16, heads)
    b, c = draw.normal(size=(2, batch, length, groups, size))
    state = 1e3 * draw.normal(size=(batch, heads, width, size))
    inputs = [torch.tensor(v, dtype=torch.float32) for v in (x, dt, a, b, c, state)]
    y, final = selective_scan(*inputs, chunk=chunk)
    for row in range(batch):
        for head in range(heads):
            s, group = state[row, head], head // 2
            for t in range(length):
                s = np.exp(dt[row, t, head] * a[head]) * s
                s = s + dt[row, t, head] * np.outer(x[row, t, head], b[row, t, group])
                assert np.allclose(y[row, t, head], s @ c[row, t, group], atol=5e-3, rtol=1e-5)
            assert np.allclose(final[row, head], s, atol=1e-3, rtol=1e-5)


def test_bfloat16_stays_near_float32(random_towers):
    """Small, because one flipped expert of a near-tie changes everything after it."""
    towers, half = random_towers("M*M", seed=4), random_towers("M*M", 4, torch.bfloat16)
    towers.context.to(torch.bfloat16).to(torch.float32)
    towers.denoiser.to(torch.bfloat16).to(torch.float32)
    ids, block = draw_ids(17, 2, 25), draw_ids(18, 2, 16)
    block[:, ::2] = MASK
    exact, states, past = feed(towers, [ids])
    rough, rough_states, _ = feed(half, [ids], dtype=torch.bfloat16)
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()
    kinds = {name.rsplit(".", 1)[1]: state.dtype for name, state in rough_states.items()}
    assert kinds == {
        "conv_state": torch.bfloat16,
        "ssm_state": torch.float32,
        "k_cache": torch.bfloat16,
        "v_cache": torch.bfloat16,
    }
    exact, rough = denoise(towers, block, past, states), denoise(half, block, past, rough_states)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


def test_parameter_names_are_the_checkpoints(random_towers):
    towers = random_towers("ME*")
    own = {**towers.context.state_dict(), **towers.denoiser.state_dict()}
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == expected_tensors(
        towers.config
    )
