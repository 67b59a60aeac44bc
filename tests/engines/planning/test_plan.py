"""Sizes of the released model, and the memory plans made of them, against hand calculations."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction

import pytest

from tests.support import FULL_SIZE
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from twotower_contract.errors import ConfigError
from twotower_contract.sizes import (
    conv_bytes,
    kv_bytes_per_token,
    part_of,
    parts_of_tower,
    ssm_bytes,
)
from twotower_contract.skus import GIB, known_skus
from twotower_engines.errors import PlanError
from twotower_engines.planning.compiled import TABLE_FILE
from twotower_engines.planning.fit import largest_context, largest_slots, refusal, require_fit
from twotower_engines.planning.model_size import ModelSize, read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory, resolve_precision
from twotower_engines.planning.precisions import Precision, weight_sizes
from twotower_engines.planning.sku_lookup import find_sku
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.tiny.checkpoints import tiny_config

MIB = 1 << 20


@pytest.fixture(scope="module")
def model() -> ModelSize:
    return read_model_size(FULL_SIZE)


@pytest.fixture
def config(tmp_path):
    """A function that writes the full-size config.json with changes, and returns its path."""

    def write(**changes):
        values = json.loads((FULL_SIZE / "config.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path / "config.json"

    return write


# --- sizes ---


def test_parameters_of_the_released_model(model):
    parts = parts_of_tower(model.config, "denoiser")
    assert parts["mamba"] == 23 * 38_742_208
    assert parts["attention"] == 6 * 23_396_352
    assert parts["routed experts"] == 23 * 128 * 9_977_856
    assert parts["shared experts"] == 23 * 19_955_712
    assert parts["router"] == 23 * (344_064 + 128)
    assert parts["embeddings"] == parts["head"] == 352_321_536
    assert parts["time conditioning"] == 7_918_848 + 21_684_096 + 419_328
    assert sum(parts_of_tower(model.config, "context").values()) == 31_577_940_288
    assert model.parameters == 63_185_902_848


def test_bytes_of_the_released_model(model):
    assert model.parameters * 2 / GIB == pytest.approx(117.69, abs=0.005)
    assert parts_of_tower(model.config, "context")["routed experts"] * 2 == pytest.approx(
        58.75e9, rel=1e-4
    )
    assert kv_bytes_per_token(model.config, 2) == 6144
    assert ssm_bytes(model.config) == 46 * MIB
    assert conv_bytes(model.config, 2) == 23 * 3 * 6144 * 2


def test_a_bundle_tells_the_same_as_its_checkpoint(random_engines):
    made = random_engines("MEM*E")
    from_config = read_model_size(made.checkpoint)
    from_manifest = read_model_size(made.folder)
    assert parts_of_tower(from_config.config, "denoiser") == parts_of_tower(
        from_manifest.config, "denoiser"
    )
    assert from_config.towers == from_manifest.towers == ("context", "denoiser")
    assert from_config.config.dtype == from_manifest.config.dtype == "float32"
    assert from_config.warnings == ()  # the shards hold exactly what we counted


def test_shards_that_hold_something_else_are_pointed_out(random_engines, tmp_path):
    checkpoint = random_engines("MEM*E").checkpoint
    for file in checkpoint.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "optimizer.safetensors").write_bytes(b"not in the index, so not read")
    values = json.loads((checkpoint / "config.json").read_text())
    values["n_routed_experts"] += 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    (warning,) = read_model_size(tmp_path).warnings
    assert "the shards beside it hold" in warning


def test_a_single_tower_checkpoint(config):
    single = read_model_size(config(architectures=["NemotronHForCausalLM"]))
    assert single.towers == ("context",)
    assert single.parameters == 31_577_940_288
    plan = plan_memory(single, PlanRequest(find_sku("h100-sxm")))
    assert (plan.fits, len(plan.gpus), plan.placement) == (True, 1, "context tower on one GPU")
    with pytest.raises(PlanError, match="has only the context tower"):
        plan_memory(single, PlanRequest(find_sku("h100-sxm"), gpus=2))


def test_a_pattern_needs_only_its_own_sizes(config):
    model = read_model_size(
        config(hybrid_override_pattern="M*", num_hidden_layers=2, n_routed_experts=None)
    )
    assert parts_of_tower(model.config, "context")["routed experts"] == 0
    assert plan_memory(model, PlanRequest(find_sku("l4"))).fits


@pytest.mark.parametrize(
    "change",
    [
        {"hybrid_override_pattern": None},
        {"hybrid_override_pattern": "MX", "num_hidden_layers": 2},
        {"num_hidden_layers": 51},
        {"hidden_size": "2688"},
        {"n_routed_experts": None},
        {"n_groups": 5},
        {"tie_word_embeddings": True},
        {"eos_token_id": [2, 3]},
        {"torch_dtype": "float16"},
        {"max_position_embeddings": "4096"},
        {"max_position_embeddings": 10**30},
        {"layer_norm_epsilon": math.nan},
        {"layer_norm_epsilon": 10**400},
        {"conv_kernel": "4"},
        {"quantization_config": {"quant_method": "fp8"}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ],
)
def test_plan_refuses_what_export_refuses_in_the_same_words(config, change):
    path = config(**change)
    with pytest.raises(ConfigError) as planned:
        read_model_size(path)
    with pytest.raises(ConfigError) as exported:
        open_checkpoint(path.parent)
    assert str(planned.value) == str(exported.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(PlanError, match="found an empty folder"):
        read_model_size(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(PlanError, match="found neither of them"):
        read_model_size(tmp_path)
    with pytest.raises(PlanError, match="found nothing"):
        read_model_size(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_model_size(tmp_path)


def test_a_literal_infinity_is_read(config):
    path = config()
    path.write_text(path.read_text().replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    assert read_model_size(path).parameters == 63_185_902_848


# --- precisions ---


def test_what_each_precision_takes(model):
    def gib(name):
        return sum(sum(weight_sizes(model, tower, name).values()) for tower in model.towers)

    experts = 2 * (29_374_808_064 + 458_981_376)
    mamba = 2 * 17 * (10_304 * 2_688 + 2_688 * 4_096)  # of 23; 6 lie before an attention
    narrow = experts + mamba
    rest = 2 * (63_185_902_848 - narrow)
    assert gib("bf16") == 126_371_805_696
    assert gib("float32") == 2 * gib("bf16")
    assert gib("fp8") == narrow + rest
    assert gib("nvfp4") == narrow * 9 // 16 + rest  # 4 bits and a scale byte per 16
    assert gib("int4") == narrow * 17 // 32 + rest  # 4 bits and 2 bytes per 64


def test_what_must_stay_wide(model):
    sizes = {
        name: weight_sizes(model, "denoiser", name) for name in ("bf16", "fp8", "nvfp4", "int4")
    }
    for name, parts in sizes.items():
        for part in ("time conditioning", "router", "embeddings", "head", "attention", "norms"):
            assert parts[part] == sizes["bf16"][part], (name, part)
    assert sizes["nvfp4"]["mamba"] > sizes["bf16"]["mamba"] * 6 // 23


@pytest.mark.parametrize("format_", ["fp8", "nvfp4", "int4"])
def test_a_quantized_checkpoint_has_the_sizes_that_were_planned(tmp_path, format_):
    """Of its bytes; the scales of whole matrices are beside the point."""
    config = tiny_config("MEM*E", hidden=64)
    source = open_checkpoint(write_checkpoint(tmp_path / "c", config, random_tensors(config)))
    recipe = default_recipe(source, format_)
    quantize_checkpoint(source, tmp_path / "quantized", recipe)
    wide, narrow = read_model_size(tmp_path / "c"), read_model_size(tmp_path / "quantized")
    assert (wide.precision, narrow.precision, narrow.warnings) == (None, format_, ())
    sku = find_sku("rtx-pro-6000")
    assert resolve_precision(narrow, sku, "auto") == format_
    assert resolve_precision(narrow, find_sku("cpu"), "auto") == "float32"
    with pytest.raises(PlanError, match=f"are stored in {format_}; leave the option out"):
        resolve_precision(narrow, sku, "bf16")
    plan = plan_memory(narrow, PlanRequest(sku, context=1024))
    assert plan.gpus[0].weight_bytes == sum(
        one.end - one.begin for one in open_checkpoint(tmp_path / "quantized").tensors.values()
    )
    for tower in wide.towers:
        for part, size in weight_sizes(wide, tower, format_).items():
            matrices = sum(part_of(config, name) == (tower, part) for name in recipe.formats)
            scales = matrices * {"fp8": 4, "nvfp4": 4, "int4": 16}[format_]
            assert weight_sizes(narrow, tower, format_)[part] == size + scales, (tower, part)


def test_sizes_agree_with_a_measured_quantization(model):
    """W4A16 experts with an fp16 scale per 16 took a tower from 59 to 21 GiB on two DGX Spark."""
    spark = Precision("w4a16", Fraction(5), Fraction(16), "")
    parts = parts_of_tower(model.config, "context")
    tower = sum(spark.sizes(model.config, "context").values())
    narrow = parts["shared experts"] + parts["mamba"] * 17 // 23
    tower += narrow * 11 // 8  # there these stayed bf16
    assert 20.5 < tower / GIB < 21.9


def test_auto_takes_the_widest_that_fits(model):
    names = {
        name: plan_memory(model, PlanRequest(sku)).precision for name, sku in known_skus().items()
    }
    assert names["h200"] == names["h100-sxm"] == names["rtx-pro-6000"] == "bf16"
    assert names["l40s"] == names["dgx-spark"] == names["gh200"] == "fp8"
    assert names["rtx-5090"] == names["a100-40"] == "nvfp4"
    assert names["a10"] == "int4"
    # where no kernel is, nothing narrower than what the compiler reads is chosen
    for changes in ({"flavour": "tensorrt-rtx"}, {"flavour": "tensorrt", "kernels": False}):
        plan = plan_memory(model, PlanRequest(find_sku("rtx-5090"), **changes))
        assert (plan.precision, plan.fits) == ("bf16", False)
    # nothing fits: the weights as released
    assert plan_memory(model, PlanRequest(find_sku("a10"), slots=64)).precision == "bf16"
    for name in ("l40s", "rtx-5090", "gh200"):
        assert plan_memory(model, PlanRequest(find_sku(name))).buildable
    assert plan_memory(model, PlanRequest(find_sku("rtx-5090"))).flavour == "tensorrt"


def test_precisions_that_cannot_be(model):
    with pytest.raises(PlanError, match="none of auto, float32, bf16"):
        resolve_precision(model, find_sku("h200"), "fp16")
    with pytest.raises(PlanError, match="A100 80 GB SXM does not compute in fp8, only in bf16"):
        plan_memory(model, PlanRequest(find_sku("a100-80"), precision="fp8"))
    with pytest.raises(PlanError, match="does not compute in float32"):
        plan_memory(model, PlanRequest(find_sku("h200"), precision="float32"))


def test_the_cpu_and_fp32_checkpoints_are_fp32(model):
    fp32 = replace(model, config=replace(model.config, dtype="float32"))
    for precision in ("auto", "bf16"):
        assert resolve_precision(model, find_sku("cpu"), precision) == "float32"
        assert resolve_precision(fp32, find_sku("h200"), precision) == "float32"
    weights = plan_memory(fp32, PlanRequest(find_sku("b300"), 1)).gpus[0].weight_bytes
    assert weights == 4 * model.parameters


# --- plans ---


def test_kept_prefixes_take_memory_beside_the_context_tower(model):
    for gpus in (1, 2):
        request = PlanRequest(find_sku("h200"), gpus)
        plan, without = (plan_memory(model, replace(request, prefix_bytes=n)) for n in (GIB, 0))
        taken = [
            one.total - other.total for one, other in zip(plan.gpus, without.gpus, strict=True)
        ]
        assert taken == [GIB, 0][:gpus]
    full = plan_memory(model, PlanRequest(find_sku("h200"), 1, prefix_bytes=100 * GIB))
    assert not full.fits


def test_one_h200_holds_both_towers(model):
    request = PlanRequest(find_sku("h200"), 1, slots=16, context=8192, max_tokens_per_call=256)
    plan = plan_memory(model, request)
    (gpu,) = plan.gpus
    assert plan.fits
    assert plan.buildable
    assert plan.placement == "both towers on one GPU"
    assert gpu.weight_bytes == 126_371_805_696
    assert gpu.states == {
        "keys and values": 16 * (8192 + 256) * 6144,
        "ssm": 16 * 46 * MIB,
        "conv": 16 * 847_872,
        "mock_ar copy": 16 * (46 * MIB + 847_872),
    }
    # the largest call: 16 rows of 256 tokens, and of a block of 64
    assert gpu.buffers["new states"] == 16 * (46 * MIB + 847_872)
    assert gpu.buffers["context queries"] == 16 * 256 * 4096 * 2
    assert gpu.buffers["denoiser queries"] == 16 * 64 * 4096 * 2
    assert gpu.buffers["denoiser logits"] == 16 * 64 * 131072 * 2, "in the towers' dtype"
    assert gpu.buffers["context logits"] == 16 * 131072 * 4
    terms = json.loads(TABLE_FILE.read_text())["towers"]["context"]["kernels"]["scratch"]
    elements = 16 * 256 * (8192 + 256)  # of the mask: a call's tokens, and all that a cache holds
    scratch = terms["1"] + 16 * 256 * terms["rows * tokens"]
    scratch += elements * terms["rows * tokens * context"]
    assert gpu.workspace["context"] == pytest.approx(1.1 * scratch, abs=2)
    assert 0.1e9 < scratch < 2e9
    assert gpu.total == gpu.weight_bytes + gpu.overhead + sum(
        sum(group.values()) for group in (gpu.states, gpu.buffers, gpu.workspace)
    )
    assert gpu.capacity == int(find_sku("h200").memory * 0.98)
    assert gpu.free == gpu.capacity - gpu.total > 0
    bodies = plan_memory(model, replace(request, kernels=False)).gpus[0].buffers
    assert bodies["denoiser logits"] == 16 * 131072 * 2, "of a token: only `mock_ar` reads them"


def test_two_h100_hold_a_tower_each(model):
    sku = find_sku("h100-sxm")
    assert not plan_memory(model, PlanRequest(sku, gpus=1, precision="bf16")).fits
    plan = plan_memory(model, PlanRequest(sku))
    assert plan.fits
    first, second = plan.gpus
    assert (first.towers, second.towers) == (("context",), ("denoiser",))
    assert plan.placement == "context tower on GPU 0, denoiser tower on GPU 1"
    # the denoiser's GPU mirrors them, and keeps those before the last token for mock_ar
    assert second.states == {**first.states, "mock_ar copy": 16 * (46 * MIB + 847_872)}
    assert first.weight_bytes == 63_155_880_576
    assert "time conditioning" in second.weights["denoiser"]
    assert "new states" not in second.buffers


def test_chunks_shrink_before_a_plan_is_refused(model):
    request = PlanRequest(find_sku("h200"), 1, precision="bf16")
    most = largest_slots(model, replace(request, max_tokens_per_call=256))
    more = plan_memory(model, replace(request, slots=most + 1))
    assert plan_memory(model, replace(request, slots=most)).max_tokens_per_call == 256
    assert more.max_tokens_per_call < 256
    assert more.fits
    assert plan_memory(model, replace(request, slots=8)).max_tokens_per_call == 1024
    bodies = PlanRequest(find_sku("rtx-pro-6000"), slots=1, precision="bf16")
    assert plan_memory(model, bodies).max_tokens_per_call == 256, "all experts for each token"
    assert not plan_memory(model, replace(more.asked, max_tokens_per_call=256)).fits


def test_function_bodies_need_more_workspace(model):
    sku = find_sku("a100-80")
    small = PlanRequest(sku, 2, 16, 512, flavour="tensorrt", max_tokens_per_call=256)
    ours, bodies, without = (
        plan_memory(model, request).gpus[0].workspace["context"]
        for request in (
            small,
            replace(small, flavour="tensorrt-rtx"),
            replace(small, kernels=False),
        )
    )
    assert bodies > 3 * ours
    assert without == bodies, "TensorRT without our kernels runs the same bodies"
    with pytest.raises(PlanError, match="h200 is served by tensorrt"):
        plan_memory(model, PlanRequest(find_sku("h200"), flavour="tensorrt-rtx"))


def test_float32_takes_twice_the_workspace(model):
    fp32 = replace(model, config=replace(model.config, dtype="float32"))
    request = PlanRequest(find_sku("b300"), 1, precision="bf16", max_tokens_per_call=256)
    narrow, wide = (plan_memory(one, request).gpus[0].workspace for one in (model, fp32))
    assert plan_memory(fp32, request).precision == "float32"
    for tower, size in narrow.items():
        assert wide[tower] == pytest.approx(2 * size, abs=4)


@pytest.mark.parametrize(("name", "gpus"), [("h200", 1), ("h100-nvl", 2), ("b200", 1)])
def test_the_largest_that_fit_are_the_largest(model, name, gpus):
    sku = find_sku(name)
    slots = largest_slots(model, PlanRequest(sku, gpus, precision="bf16"))
    assert plan_memory(model, PlanRequest(sku, gpus, slots, 8192, "bf16")).fits
    assert not plan_memory(model, PlanRequest(sku, gpus, slots + 1, 8192, "bf16")).fits
    context = largest_context(model, PlanRequest(sku, gpus, precision="bf16"))
    assert plan_memory(model, PlanRequest(sku, gpus, 16, context, "bf16")).fits
    if context < model.config.max_position_embeddings:
        assert not plan_memory(model, PlanRequest(sku, gpus, 16, context + 256, "bf16")).fits


def test_more_of_anything_never_takes_less(model):
    sku = find_sku("b200")

    def total(slots, context):
        plan = plan_memory(
            model, PlanRequest(sku, 1, slots, context, "bf16", max_tokens_per_call=64)
        )
        return plan.gpus[0].total

    by_slots = [total(slots, 8192) for slots in range(1, 70)]
    by_context = [total(16, context) for context in range(256, 20_000, 999)]
    assert by_slots == sorted(by_slots)
    assert by_context == sorted(by_context)


def test_a_refusal_names_what_fits(model):
    plan = plan_memory(model, PlanRequest(find_sku("h200"), 1, 64, 32768, "bf16"))
    with pytest.raises(PlanError) as refused:
        require_fit(plan)
    text = str(refused.value)
    assert "64 slots x 32768 tokens in bf16 do not fit on 1 x h200" in text
    slots = largest_slots(model, PlanRequest(find_sku("h200"), 1, context=32768, precision="bf16"))
    assert f"--slots {slots} (same context)" in text
    assert "--gpus 2 (one tower on each)" in text
    assert re.search("--sku b[23]00 --gpus 1", text)
    assert "--precision fp8" in text
    assert "quantize first" in text
    fewer = plan_memory(model, PlanRequest(find_sku("h200"), 1, slots, 32768, "bf16"))
    assert require_fit(fewer) is fewer


def test_a_refusal_of_a_small_gpu_names_another(model):
    request = PlanRequest(find_sku("a10"), slots=64, precision="bf16")
    text = refusal(plan_memory(model, request))
    assert "GPU 1 of a10 would hold" in text
    assert re.search("--sku [bh][0-9]+ --gpus 1; --sku h[0-9a-z-]+ --gpus 2", text)
    assert "--precision nvfp4 --gpus 2 --slots" in text
    assert "--slots 0" not in text


REFUSED = [
    *(PlanRequest(find_sku(name), slots=64) for name in ("a10", "l4")),
    *(
        PlanRequest(find_sku(name), precision="bf16")
        for name in ("a10", "a100-40", "l40s", "gh200", "dgx-spark", "rtx-5090")
    ),
    PlanRequest(find_sku("h200"), 1, 64, 32768, "bf16"),
    PlanRequest(find_sku("rtx-pro-6000"), slots=128, context=32768, precision="bf16"),
    # function bodies and large blocks take more than the defaults
    PlanRequest(find_sku("a100-80"), slots=96, precision="bf16", flavour="tensorrt-rtx"),
    PlanRequest(find_sku("rtx-pro-6000"), slots=96, precision="bf16", block_size_max=256),
    PlanRequest(find_sku("h200"), 1, 60, precision="bf16", block_size_max=256),
    PlanRequest(find_sku("h100-sxm"), None, 120, 512, "bf16", kernels=False),
    PlanRequest(find_sku("l40s"), precision="fp8", slots=128),
]


@pytest.mark.parametrize("request_", REFUSED, ids=lambda one: f"{one.sku.name}-{one.slots}")
def test_every_suggestion_fits(model, request_):
    """Follow the suggestions of a refusal literally; what they do not name stays."""
    plan = plan_memory(model, request_)
    assert not plan.fits
    suggestions = refusal(plan).split("What fits: ")[1].split("; ")
    assert suggestions
    for suggestion in suggestions:
        words = re.sub(r" \(.*\)$", "", suggestion).split()
        if words[:2] == ["pip", "install"]:
            again = replace(request_, kernels=True)
        else:
            options = dict(zip(words[::2], words[1::2], strict=True))
            flavour = options.get("--flavour", request_.flavour)
            again = replace(
                request_,
                sku=find_sku(options.get("--sku", request_.sku.name)),
                gpus=int(options.get("--gpus", len(plan.gpus))),
                slots=int(options.get("--slots", request_.slots)),
                context=int(options.get("--context", request_.context)),
                precision=options.get("--precision", request_.precision),
                flavour=None if flavour == "auto" else flavour,
            )
        made = plan_memory(model, again)
        assert made.fits, suggestion
        assert made.buildable


def test_suggestions_keep_what_was_asked(model):
    """A smaller number of slots fits with large blocks than without."""
    request = PlanRequest(find_sku("h200"), 1, 60, precision="bf16")
    large = replace(request, block_size_max=256)
    assert largest_slots(model, large) < largest_slots(model, request)
    assert f"--slots {largest_slots(model, large)} " in refusal(plan_memory(model, large))
    ours = PlanRequest(find_sku("h100-sxm"), None, 16, 512, "bf16")
    without = replace(ours, slots=largest_slots(model, ours), kernels=False)
    assert not plan_memory(model, without).fits
    assert plan_memory(model, replace(without, kernels=True)).fits
    assert "pip install 'twotower[kernels]' (same limits)" in refusal(plan_memory(model, without))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpus": 3}, "1 GPU or on 2"),
        ({"slots": 0}, "--slots is 0"),
        ({"slots": 1000}, "--slots is 1000"),
        ({"context": 0}, "--context is 0"),
        ({"context": 300_000}, "takes 1 to 262144 tokens"),
    ],
)
def test_impossible_requests(model, arguments, message):
    with pytest.raises(PlanError, match=message):
        plan_memory(model, PlanRequest(find_sku("h200"), **arguments))


def test_one_gpu_machines_have_one(model):
    for name in ("gh200", "dgx-spark", "cpu"):
        with pytest.raises(PlanError, match="tower on each of two machines is not supported"):
            plan_memory(model, PlanRequest(find_sku(name), gpus=2))


def test_unified_memory_is_not_all_ours(model):
    spark = find_sku("dgx-spark")
    plan = plan_memory(model, PlanRequest(spark, precision="bf16"))
    assert plan.gpus[0].capacity < 102 * GIB < spark.memory


def test_a_tiny_checkpoint_on_the_cpu(random_engines):
    model = read_model_size(random_engines("MEM*E").checkpoint)
    plan = plan_memory(model, PlanRequest(find_sku("cpu"), context=512, slots=4))
    assert plan.fits
    assert plan.precision == "float32"
    assert plan.gpus[0].weight_bytes == 4 * model.parameters


def test_as_json_is_json(model):
    values = json.loads(json.dumps(plan_memory(model, PlanRequest(find_sku("h100-sxm"))).as_json()))
    assert values["gpus"][0]["weights"]["context"]["routed experts"] == 2 * 29_374_808_064
    assert values["max_tokens_per_call"] == 1024
    assert values["basis"].keys() == {"compiled", "arithmetic", "assumed"}
