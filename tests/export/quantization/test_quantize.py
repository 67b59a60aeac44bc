"""The verb `quantize`: which matrices, which files, and what a run that was ended leaves."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from tests.support.checkpoint_files import RawTensor, random_tensors, write_checkpoint
from twotower_contract.errors import CheckpointError
from twotower_engines.artifacts.weights import WeightStore
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.quantize import quantize
from twotower_export.inventory import take_inventory
from twotower_export.quantization import writing
from twotower_export.quantization.recipe import RecipeError, default_recipe, read_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.reference.mapped import NamedTensors
from twotower_export.tiny.checkpoints import copy_pretrained, tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("MM*E", hidden=32)
UP = "denoiser_tower.layers.3.mixer.experts.1.up_proj.weight"
FORMATS = ("fp8", "nvfp4", "int4")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "source"
    return open_checkpoint(write_checkpoint(folder, CONFIG, random_tensors(CONFIG)))


@pytest.fixture(scope="module", params=FORMATS)
def quantized(request, source, tmp_path_factory):
    """Format, folder and report."""
    out = tmp_path_factory.mktemp(request.param) / "out"
    recipe = default_recipe(source, request.param)
    return request.param, out, quantize_checkpoint(source, out, recipe)


def contents(folder):
    files = sorted(one for one in folder.iterdir())
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def test_nvidias_exclusions_keep_their_dtype(quantized):
    _, out, _ = quantized
    narrow = {
        name.removesuffix("_packed")
        for name, tensor in open_checkpoint(out).tensors.items()
        if tensor.dtype in ("F8_E4M3", "U8", "I32") and not name.endswith("_scale")
    }
    for tower in ("context", "denoiser"):
        layers = f"{tower}_tower.layers"
        wanted = {f"{layers}.0.mixer.{name}_proj.weight" for name in ("in", "out")}
        experts = [f"experts.{number}" for number in range(CONFIG.num_experts)]
        wanted |= {
            f"{layers}.3.mixer.{expert}.{name}_proj.weight"
            for expert in [*experts, "shared_experts"]
            for name in ("up", "down")
        }
        assert {name for name in narrow if name.startswith(tower)} == wanted
    assert all(name.startswith(("context_tower.", "denoiser_tower.")) for name in narrow)


def test_kept_tensors_are_the_same_bytes(source, quantized):
    _, out, _ = quantized
    opened = open_checkpoint(out)
    kept = opened.tensors.keys() & source.tensors.keys()
    same = [name for name in kept if opened.tensors[name].dtype == source.tensors[name].dtype]
    assert len(same) > 60
    theirs, ours = NamedTensors(source.path), NamedTensors(out)
    for name in same:
        assert ours.read(name).equal(theirs.read(name)), name


def test_engines_and_reference_decode_the_same(source, quantized, tmp_path):
    """The engines' tables in NumPy against PyTorch's own types, and both against the source."""
    format_, out, report = quantized
    manifest = write_bundle(open_checkpoint(out), tmp_path / "bundle")
    store = WeightStore(manifest)
    store.check()
    theirs, original = NamedTensors(out), NamedTensors(source.path)
    worst = 0.0
    for tower in manifest.towers:
        for name, array in store.all_float32(tower):
            weight = manifest.weights[tower][name]
            names = [one.removesuffix("_packed") for one in weight.sources]
            decoded = np.stack([theirs.read(one).float().numpy() for one in names])
            np.testing.assert_array_equal(array.reshape(decoded.shape), decoded)
            if weight.format is not None:
                exact = np.stack([original.read(one).float().numpy() for one in names])
                errors = np.sqrt(((decoded - exact) ** 2).mean((1, 2)) / (exact**2).mean((1, 2)))
                worst = max(worst, errors.max())
    assert worst == pytest.approx(
        max(part["worst_relative_rms"] for part in report["parts"]), rel=1e-4
    )
    assert worst < {"fp8": 0.03, "nvfp4": 0.1, "int4": 0.13}[format_]


def test_report_and_inventory_count_the_same_bytes(source, quantized):
    _, out, report = quantized
    opened = open_checkpoint(out)
    tensors = {name: (one.dtype, one.shape) for name, one in opened.tensors.items()}
    inventory = take_inventory(opened.config, tensors)
    before = {name: (one.dtype, one.shape) for name, one in source.tensors.items()}
    assert inventory.parameters == take_inventory(source.config, before).parameters
    assert inventory.bytes == report["bytes_after"] < report["bytes_before"]
    assert json.loads((out / "quantization.json").read_text()) == report
    assert sum(part["matrices"] for part in report["parts"]) == 2 * 2 * (2 + CONFIG.num_experts)


def test_settings_name_what_is_kept(quantized):
    format_, out, _ = quantized
    values = json.loads((out / "config.json").read_text())["quantization_config"]
    kept = values["ignore"]
    assert {"lm_head", "context_lm_head", "t_block.1", "t_embedder.mlp.0"} <= set(kept)
    assert "context_tower.layers.2.mixer.q_proj" in kept
    assert "context_tower.layers.1.mixer.in_proj" in kept  # before the attention
    assert "context_tower.layers.0.mixer.in_proj" not in kept
    if format_ == "int4":
        assert (values["quant_method"], values["format"]) == (
            "compressed-tensors",
            "pack-quantized",
        )
        assert values["config_groups"]["group_0"]["weights"]["group_size"] == 32
        assert not (out / "hf_quant_config.json").exists()
    else:
        settings = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
        algorithm = {"fp8": "FP8", "nvfp4": "W4A16_NVFP4"}[format_]
        assert settings["quant_algo"] == values["quant_algo"] == algorithm
        assert settings["exclude_modules"] == kept


def test_the_same_command_gives_the_same_files(source, quantized, tmp_path):
    format_, out, _ = quantized
    quantize_checkpoint(source, tmp_path / "again", default_recipe(source, format_))
    assert contents(tmp_path / "again") == contents(out)


def ended_after(monkeypatch, shards):
    """Let the run be interrupted when so many shards are complete."""
    write, calls = writing._write_shard, []

    def counted(*arguments):
        if len(calls) == shards:
            raise KeyboardInterrupt
        calls.append(arguments)
        return write(*arguments)

    monkeypatch.setattr(writing, "_write_shard", counted)
    return calls


def test_a_disk_that_is_too_small_is_left_as_it_was(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=f"{out}: .* GB are still to be written"):
        quantize_checkpoint(source, out, default_recipe(source, "fp8"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_ended_goes_on(source, tmp_path, monkeypatch):
    recipe = default_recipe(source, "fp8")
    quantize_checkpoint(source, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        ended_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    left = sorted(one.name for one in (tmp_path / ".quantizing-out").glob("*.safetensors*"))
    assert left == [shard.file for shard in source.shards[:2]]  # and nothing half-written
    calls = ended_after(monkeypatch, 99)
    quantize_checkpoint(source, tmp_path / "out", recipe)
    assert len(calls) == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "whole"]


def test_another_recipe_begins_anew(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        ended_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", default_recipe(source, "fp8"))
    calls = ended_after(monkeypatch, 99)
    quantize_checkpoint(source, tmp_path / "out", default_recipe(source, "nvfp4"))
    assert len(calls) == 3
    assert {one.dtype for one in open_checkpoint(tmp_path / "out").tensors.values()} == {
        *("BF16", "F32", "U8", "F8_E4M3")
    }


def test_an_output_is_replaced_and_nothing_else(source, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(source, out, default_recipe(source, "fp8"))
    quantize_checkpoint(source, out, default_recipe(source, "int4"))
    assert any(one.dtype == "I32" for one in open_checkpoint(out).tensors.values())
    shutil.copytree(source.path, tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds files that are not a quantized checkpoint"):
        quantize_checkpoint(source, tmp_path / "other", default_recipe(source, "fp8"))


def test_a_damaged_weight_is_named(tmp_path):
    tensors = random_tensors(CONFIG)
    bits = np.frombuffer(tensors[UP].data, np.uint16).copy()
    bits[7] = 0x7FC0
    tensors[UP] = RawTensor("BF16", tensors[UP].shape, bits.tobytes())
    damaged = open_checkpoint(write_checkpoint(tmp_path / "damaged", CONFIG, tensors))
    with pytest.raises(CheckpointError, match=rf"{UP}: a weight is infinite or not a number"):
        quantize_checkpoint(damaged, tmp_path / "out", default_recipe(damaged, "nvfp4"))
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    copy_pretrained(tmp_path / "c")
    folders = [str(tmp_path / "c"), str(tmp_path / "out")]
    arguments = [*folders, "--format", "fp8", "--tower", "context"]
    dry = CliRunner().invoke(quantize, [*arguments, "--dry-run"])
    assert "would write a quantized checkpoint of 0.00 GB" in str(dry.exception)
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(quantize, [*arguments, "--keep", "mamba", "--json"])
    report = json.loads(done.stdout)
    assert {(part["tower"], part["part"]) for part in report["parts"]} == {
        ("context", "routed experts"),
        ("context", "shared experts"),
    }
    assert report["seconds"] > 0
    done = CliRunner().invoke(quantize, [*arguments[:4]])
    assert done.exit_code == 0, done.output
    rows = [line.split()[:4] for line in done.stdout.splitlines()]
    assert ["context:", "routed", "experts", "fp8"] in rows
    assert "next: twotower export" in done.stdout
    for given in (["--recipe", "r.json", "--keep", "mamba"], []):
        assert CliRunner().invoke(quantize, [*arguments[:2], *given]).exit_code == 1


RECIPES = {
    "nothing": ({"rules": []}, "leaves nothing to quantize"),
    "idle": (
        {"rules": [{"match": "*", "format": "fp8"}, {"match": "*up*", "format": "nvfp4"}]},
        r"nothing is left for the rule '\*up\*'",
    ),
    "embeddings": ({"rules": [{"match": "*embeddings*", "format": "fp8"}]}, "matches no matrix"),
    "format": ({"rules": [{"match": "*", "format": "fp4"}]}, "a rule has a `match` and a `format`"),
    "key": ({"rules": [{"match": "*", "format": "fp8", "x": 1}]}, "a rule has a `match`"),
    "layouts": (
        {
            "rules": [
                {"match": "*experts*", "format": "int4"},
                {"match": "*in_proj*", "format": "fp8"},
            ]
        },
        "mixes int4 with fp8",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_that_cannot_be_followed(source, tmp_path, name):
    content, message = RECIPES[name]
    (tmp_path / "recipe.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=message):
        read_recipe(source, tmp_path / "recipe.json")


def test_a_recipe_mixes_formats(source, tmp_path):
    rules = [
        {"match": "*.experts.*", "format": "nvfp4"},
        {"match": "*.shared_experts.*", "format": "keep"},
        {"match": "*_proj.weight", "format": "fp8"},
        {"match": "context_lm_head.weight", "format": "fp8"},
    ]
    (tmp_path / "recipe.json").write_text(json.dumps({"rules": rules}))
    recipe = read_recipe(source, tmp_path / "recipe.json")
    quantize_checkpoint(source, tmp_path / "out", recipe)
    opened = open_checkpoint(tmp_path / "out")
    dtypes = {name: one.dtype for name, one in opened.tensors.items()}
    assert dtypes[UP] == "U8"
    assert dtypes["denoiser_tower.layers.2.mixer.q_proj.weight"] == "F8_E4M3"
    assert dtypes["context_lm_head.weight"] == "F8_E4M3"
    assert dtypes["lm_head.weight"] == "BF16"
    assert dtypes["denoiser_tower.layers.3.mixer.shared_experts.up_proj.weight"] == "BF16"
    settings = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert settings["quant_algo"] == "MIXED_PRECISION"
    layers = settings["quantized_layers"]
    assert layers[UP.removesuffix(".weight")] == {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    assert layers["context_lm_head"] == {"quant_algo": "FP8"}


def test_queries_keys_and_values_share_the_scale_of_their_scales(source, tmp_path):
    """Servers join the three; vLLM wants one `weight_scale_2` then. `o_proj` has its own."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text('{"rules": [{"match": "*.mixer.[qkvo]_proj.weight", "format": "nvfp4"}]}')
    quantize_checkpoint(source, tmp_path / "out", read_recipe(source, recipe))
    stored = WeightStore(write_bundle(open_checkpoint(tmp_path / "out"), tmp_path / "bundle")).raw
    mixer, exact = "context_tower.layers.2.mixer", NamedTensors(source.path)
    largest = {
        one: float(exact.read(f"{mixer}.{one}_proj.weight").abs().max()) / (6 * 448)
        for one in "qkvo"
    }
    scales = {one: float(stored(f"{mixer}.{one}_proj.weight_scale_2")) for one in "qkvo"}
    shared = max(largest[one] for one in "qkv")
    assert len({largest[one] for one in "qkv"}) > 1
    for one in "qkv":
        assert scales[one] == pytest.approx(shared, rel=1e-6)
    assert scales["o"] == pytest.approx(largest["o"], rel=1e-6)


def test_smaller_groups_are_more_exact(source, tmp_path):
    errors = []
    for group in (32, 16):
        recipe = default_recipe(source, "int4", group=group)
        report = quantize_checkpoint(source, tmp_path / str(group), recipe)
        assert report["group_size"] == group
        errors.append(max(part["relative_rms"] for part in report["parts"]))
        name = f"{UP}_scale"
        assert open_checkpoint(tmp_path / str(group)).tensors[name].shape == (32, 32 // group)
    assert errors[1] < 0.95 * errors[0]
    with pytest.raises(RecipeError, match="have 32 as their greatest common divisor"):
        default_recipe(source, "int4", group=64)


def test_options_that_cannot_be_followed(source, quantized, tmp_path):
    with pytest.raises(RecipeError, match="--keep names 'norms'; the parts are routed-experts"):
        default_recipe(source, "fp8", ["norms"])
    with pytest.raises(RecipeError, match="leaves nothing to quantize"):
        default_recipe(source, "fp8", ["mamba", "routed-experts", "shared-experts"])
    with pytest.raises(CheckpointError, match="is quantized already"):
        default_recipe(open_checkpoint(quantized[1]), "fp8")
    odd = tiny_config("E", hidden=32, moe_intermediate_size=24)
    folder = write_checkpoint(tmp_path / "odd", odd, random_tensors(odd))
    with pytest.raises(RecipeError, match=r"down_proj\.weight has rows of 24"):
        default_recipe(open_checkpoint(folder), "nvfp4")
    with pytest.raises(RecipeError, match="have 8 as their greatest common divisor"):
        default_recipe(open_checkpoint(folder), "int4")
    assert set(default_recipe(open_checkpoint(folder), "fp8").formats.values()) == {"fp8"}
