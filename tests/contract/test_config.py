"""`config.json`: what is read, what is refused, and that writing is the inverse of reading."""

from __future__ import annotations

import json
import math

import pytest

from tests.support.sparse_checkpoint import (
    FULL_CONFIG,
    FULL_PARAMETERS,
    FULL_PATTERN,
    FULL_TENSORS,
    full_config,
)
from twotower_contract.config import ModelConfig, config_json, read_config
from twotower_contract.errors import ConfigError, TwoTowerError
from twotower_contract.json_file import read_json
from twotower_contract.layout import expected_tensors, graph_weights, source_shape
from twotower_export.tiny.checkpoints import tiny_config


def test_released_configuration_is_read():
    config = ModelConfig.from_json(FULL_CONFIG)
    assert config.pattern == FULL_PATTERN
    assert config.layers_of_kind["*"] == (5, 12, 19, 26, 33, 42)
    assert [len(config.layers_of_kind[kind]) for kind in "M*E"] == [23, 6, 23]
    assert (config.d_inner, config.conv_dim, config.projection_width) == (4096, 6144, 10304)
    assert (config.query_width, config.kv_width) == (4096, 256)
    assert config.mask_token_id == 3
    assert config.eos_token_ids == (2,)
    assert config.dtype == "bfloat16"


def test_released_layout_has_the_known_size():
    tensors = expected_tensors(full_config())
    assert len(tensors) == FULL_TENSORS
    assert sum(map(math.prod, tensors.values())) == FULL_PARAMETERS
    in_tower = [name for name in tensors if name.startswith("denoiser_tower.")]
    assert len(in_tower) == 6242
    assert len(expected_tensors(full_config(), ("context",), base=True)) == 6243


@pytest.mark.parametrize("pattern", ["M", "*", "E", "MEM*EM*E"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_writing_inverts_reading(pattern, dtype):
    config = tiny_config(pattern, 32, dtype, eos_token_ids=(2, 11), mask_token_id=5)
    text = json.dumps(config_json(config))
    assert "Infinity" in text  # as NVIDIA's file has it
    assert ModelConfig.from_json(json.loads(text)) == config


def test_every_weight_input_is_made_of_its_sources():
    config = tiny_config("ME*")
    for tower in ("context", "denoiser"):
        for name, weight in graph_weights(config, tower).items():
            count = math.prod(weight.shape)
            assert count == len(weight.sources) * math.prod(source_shape(weight)), name
    experts = graph_weights(config, "denoiser")["denoiser_tower.layers.1.mixer.experts.up_proj"]
    assert experts.shape == (8, 64, 64)
    assert experts.sources[3] == "denoiser_tower.layers.1.mixer.experts.3.up_proj.weight"


@pytest.mark.parametrize("limit", [[0.0, math.inf], [-1, math.inf], None, ...])
def test_time_step_limit_without_effect_is_accepted(limit):
    values = dict(FULL_CONFIG, time_step_limit=limit)
    if limit is ...:
        del values["time_step_limit"]
    assert ModelConfig.from_json(values) == full_config()


@pytest.mark.parametrize("limit", [[0.001, math.inf], [0.0, 0.1]])
def test_clamp_of_the_time_step_is_refused(limit):
    with pytest.raises(ConfigError, match=r"time_step_limit is .* no clamp"):
        ModelConfig.from_json(FULL_CONFIG | {"time_step_limit": limit})


@pytest.mark.parametrize("limit", [3, [1], ["a", "b"]])
def test_malformed_time_step_limit_is_refused(limit):
    with pytest.raises(ConfigError, match="time_step_limit"):
        ModelConfig.from_json(FULL_CONFIG | {"time_step_limit": limit})


@pytest.mark.parametrize(
    ("eos", "ids"), [(2, (2,)), ([2, 11], (2, 11)), ([], ()), (None, ()), (..., (2,))]
)
def test_eos_is_a_number_or_a_list(eos, ids):
    values = dict(FULL_CONFIG, eos_token_id=eos)
    if eos is ...:
        del values["eos_token_id"]
    assert ModelConfig.from_json(values).eos_token_ids == ids


def test_mask_id_is_three_or_the_files_or_the_callers():
    assert ModelConfig.from_json(FULL_CONFIG).mask_token_id == 3
    named = FULL_CONFIG | {"mask_token_id": 7}
    assert ModelConfig.from_json(named).mask_token_id == 7
    assert ModelConfig.from_json(named, mask_token_id=9).mask_token_id == 9


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_dtype_has_two_names(name):
    values = {key: value for key, value in FULL_CONFIG.items() if key != "torch_dtype"}
    assert ModelConfig.from_json(values | {name: "float32"}).dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hybrid_override_pattern": "MX", "num_hidden_layers": 2}, "letter 'X' at layer 1"),
        ({"hybrid_override_pattern": "M-", "num_hidden_layers": 2}, "plain MLP layer"),
        ({"hybrid_override_pattern": "", "num_hidden_layers": 0}, "is empty"),
        ({"hybrid_override_pattern": None}, "no Nemotron-H configuration"),
        ({"num_hidden_layers": 51}, "num_hidden_layers is 51, .* has 52 letters"),
        ({"torch_dtype": "float16"}, "'float16', but only bfloat16 and float32"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'"),
        ({"n_group": 4}, "n_group is 4"),
        ({"conv_kernel": 3}, "conv_kernel is 3"),
        ({"hidden_size": 0}, "hidden_size is 0, not >= 1"),
        ({"hidden_size": "2688"}, "`hidden_size` should be an integer, found '2688'"),
        ({"vocab_size": True}, "`vocab_size` should be an integer, found True"),
        ({"num_key_value_heads": 3}, "32 is no multiple of num_key_value_heads 3"),
        ({"n_groups": 5}, "64 is no multiple of n_groups 5"),
        ({"num_experts_per_tok": 129}, "129 exceeds n_routed_experts 128"),
        ({"eos_token_id": 131072}, r"eos_token_id\[0\] 131072 is outside"),
        ({"eos_token_id": "</s>"}, "not a token id or a list"),
        ({"mask_token_id": -1}, "mask_token_id -1 is outside .* --mask-token-id"),
        ({"eos_token_id": [2, 3]}, "token 3 is both the mask and an end of text"),
        ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon is inf, not a finite number"),
        ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon is nan, not a finite number"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1.0, not a finite number above 0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0.0, not a finite number above 0"),
        ({"routed_scaling_factor": math.inf}, "routed_scaling_factor is inf, not a finite"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor is nan, not a finite"),
        ({"time_step_limit": [math.nan, math.inf]}, "which clamps Mamba's time step"),
        (
            {"max_position_embeddings": "4096"},
            "`max_position_embeddings` should be an integer, found '4096'",
        ),
        ({"max_position_embeddings": 10**30}, "not >= 1 and at most 2147483647"),
        ({"n_routed_experts": 10**9}, "n_routed_experts is 1000000000, not >= 1 and at most 4096"),
        ({"hybrid_override_pattern": "M" * 10**6}, "has 1000000 letters, not 1 to 1024"),
        ({"layer_norm_epsilon": 10**400}, "`layer_norm_epsilon` should be a number, found 1000"),
        ({"conv_kernel": "4"}, "conv_kernel is '4', but TwoTower's towers are defined with 4"),
        ({"n_group": True}, "n_group is True, but"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, but"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is .* stretches"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .* stretches positions"),
        ({"rope_scaling": 4}, "rope_scaling is 4, which stretches positions"),
        ({"layers_block_type": ["mamba"]}, "but layers_block_type says 'M'"),
        ({"layers_block_type": ["rnn"]}, r"layers_block_type is \['rnn'\], not a list of"),
        ({"torch_dtype": None, "dtype": "float16"}, "'float16', but only bfloat16 and float32"),
    ],
)
def test_refusals_name_the_key_and_the_value(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(FULL_CONFIG | changes)


def test_layers_as_transformers_5_writes_them():
    """`layers_block_type` in place of the pattern and of the number of layers."""
    types = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
    values = {
        key: value
        for key, value in FULL_CONFIG.items()
        if key not in ("hybrid_override_pattern", "num_hidden_layers")
    } | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    values["layers_block_type"] = [types[letter] for letter in FULL_PATTERN]
    assert ModelConfig.from_json(values) == full_config()
    old = {"linear_attention": "mamba", "full_attention": "attention"}
    values["layers_block_type"] = [old.get(one, one) for one in values["layers_block_type"]]
    assert ModelConfig.from_json(values) == full_config()


def test_missing_sizes_are_all_named():
    values = {k: v for k, v in FULL_CONFIG.items() if k not in ("head_dim", "mamba_head_dim")}
    with pytest.raises(ConfigError, match="misses head_dim, mamba_head_dim"):
        ModelConfig.from_json(values)


def test_sizes_of_absent_layer_kinds_may_be_missing():
    values = {k: v for k, v in FULL_CONFIG.items() if "mamba" not in k and "expert" not in k}
    values |= {"hybrid_override_pattern": "**", "num_hidden_layers": 2}
    assert ModelConfig.from_json(values).pattern == "**"


@pytest.mark.parametrize(
    "written", ["Infinity", '{"__float__": "Infinity"}'], ids=["literal", "transformers 5"]
)
def test_infinity_is_read_as_it_is_written(tmp_path, written):
    path = tmp_path / "config.json"
    values = {key: value for key, value in FULL_CONFIG.items() if key != "time_step_limit"}
    path.write_text(json.dumps(values)[:-1] + f', "time_step_limit": [0.0, {written}]}}')
    assert read_json(path).values["time_step_limit"] == [0.0, math.inf]
    assert read_config(path) == full_config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1]", "holds a list"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"x": {"__float__": null}}', "__float__ is None, not a number"),
        (b'{"x": {"__float__": "abc"}}', "is not JSON: could not convert"),
        (b'{"n_groups": 8, "hidden_size": 1, "n_groups": 4}', "has the key 'n_groups' twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "has the key 'a' twice"),
    ],
    ids=range(8),
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, TwoTowerError)
    assert caught.value.exit_code == 2
