"""`twotower inspect` on bundles and engine sets: states, other models, damaged records."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner

from tests.support import FULL_SIZE
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.sparse_checkpoint import full_config
from twotower_contract.engine_set import BuildRecord, EngineFile, Limits
from twotower_contract.errors import BundleError, CheckpointError, TwoTowerError
from twotower_contract.layout import expected_tensors
from twotower_contract.skus import known_skus
from twotower_contract.traffic import Kernel, Listing, Tensor, traffic_of, write_listings
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint, with_full_digests
from twotower_export.cli.export import export, inspect
from twotower_export.inspection import inspect_source
from twotower_export.inventory import fitting_skus, take_inventory
from twotower_export.tiny.checkpoints import tiny_config
from twotower_export.verification.target import open_target

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("ME*", hidden=16)


def inspected(*arguments):
    """What the verb printed as JSON."""
    result = CliRunner().invoke(inspect, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)


def refused(*arguments):
    """The sentence that a refusal prints."""
    result = CliRunner().invoke(inspect, [*map(str, arguments)])
    assert isinstance(result.exception, TwoTowerError), result.exception
    assert result.exception.exit_code == 2
    return str(result.exception)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected") / "checkpoint"
    return write_checkpoint(folder, CONFIG, random_tensors(CONFIG))


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspected") / "bundle"
    write_bundle(with_full_digests(open_checkpoint(checkpoint)), out)
    return out


def write_engines(folder, bundle, sku="cpu", **changes):
    """An engine set as the builders write it, made by hand of a bundle's graphs."""
    folder.mkdir(parents=True)
    shutil.copyfile(bundle / "manifest.json", folder / "manifest.json")
    graphs = json.loads((bundle / "manifest.json").read_text())["graphs"]["float32"]
    plans, digests = {}, {}
    for tower in ("context", "denoiser"):
        shutil.copyfile(bundle / graphs[tower]["file"], folder / f"{tower}.onnx")
        digests[tower] = graphs[tower]["sha256"]
        plans[tower] = EngineFile(f"{tower}.onnx", digests[tower])
    profiles = {"context": [{"name": "all", "batch": [1, 4, 16], "tokens": [1, 16, 256]}]}
    parsed = {"layers": 1199, "inputs": {key: ["FLOAT", [1]] for key in "abc"}, "outputs": {}}
    record = BuildRecord(
        sku=sku,
        flavour="onnxruntime",
        precision="float32",
        limits=Limits(slots=4, context=256, max_tokens_per_call=256, block_size_max=16),
        plans=plans,
        graph_sha256=digests,
        profiles=profiles,
        extra={"reports": {"context": {"parsed": parsed, "engine": None}}},
    )
    (folder / "build.json").write_text(json.dumps(record.as_json() | changes))
    return folder


def test_engines(tmp_path, bundle):
    engines = write_engines(tmp_path / "engines" / "cpu", bundle)
    for source in (engines, engines.parent):
        (one,) = inspected(source)["engines"]
        assert one["build"]["sku"] == "cpu"
        for tower, plan in one["build"]["plans"].items():
            assert (plan["state"], plan["graph"]) == ("ok", "ok")
            assert plan["bytes"] == (engines / f"{tower}.onnx").stat().st_size
    text = CliRunner().invoke(inspect, [str(engines)]).stdout
    assert "profile all (least, usual, most): batch 1 to 4 to 16, tokens 1 to 16 to 256" in text
    assert "graph: 1,199 parsed layers, 3 inputs" in text
    assert "engine: its layers are not known, for a plan is opened on its GPU only" in text
    assert "cpu: onnxruntime" in text


def test_engine_as_its_builder_saw_it(tmp_path, bundle):
    parsed = {"layers": 1199, "inputs": {"a": ["FLOAT", [1]]}, "outputs": {}}
    engine = {"layers": 412, "types": {"gemm": 400, "kgen": 12}, "device_memory": 7_000_000_000}
    extra = {"reports": {"context": {"parsed": parsed, "engine": engine}}}
    engines = write_engines(tmp_path / "h200", bundle, sku="h200", extra=extra)
    text = CliRunner().invoke(inspect, [str(engines)]).stdout
    assert "engine: 412 layers (400 gemm, 12 kgen), 7 GB of device memory" in text
    assert "all of them: context.layers.json" in text


def test_engines_that_changed(tmp_path, bundle):
    engines = write_engines(tmp_path / "cpu", bundle, graph_sha256={"denoiser": "0" * 64})
    with (engines / "context.onnx").open("ab") as stream:
        stream.write(b"0")
    (engines / "denoiser.onnx").unlink()
    result = CliRunner().invoke(inspect, [str(engines), "--json"])
    assert result.exception.exit_code == 1
    for problem in ("context.onnx is changed", "denoiser.onnx is missing", "of another graph"):
        assert problem in str(result.exception)
    plans = json.loads(result.stdout)["engines"][0]["build"]["plans"]
    assert (plans["context"]["state"], plans["context"]["graph"]) == ("changed", "unknown")
    assert (plans["denoiser"]["state"], plans["denoiser"]["graph"]) == ("missing", "changed")
    text = CliRunner().invoke(inspect, [str(engines)]).stdout
    assert "denoiser: denoiser.onnx, missing, built from another graph than the manifest's" in text


def test_engine_sets_of_two_checkpoints_show_their_own_model(tmp_path, bundle):
    config = tiny_config("MM", hidden=32)
    other = write_checkpoint(tmp_path / "other", config, random_tensors(config))
    write_bundle(open_checkpoint(other), tmp_path / "other-bundle")
    write_engines(tmp_path / "engines" / "l4", bundle, "l4")
    write_engines(tmp_path / "engines" / "l40s", bundle, "l40s")
    write_engines(tmp_path / "engines" / "t4", tmp_path / "other-bundle", "t4")
    found = inspected(tmp_path / "engines")
    patterns = {
        one["build"]["sku"]: found["models"][one["model"]]["model"]["pattern"]
        for one in found["engines"]
    }
    assert patterns == {"l4": "ME*", "l40s": "ME*", "t4": "MM"}
    assert len(found["models"]) == 2
    assert "model" not in found
    text = CliRunner().invoke(inspect, [str(tmp_path / "engines")]).stdout
    first, second = text.split("\nt4: engines")
    assert "engines of 2 models" in first
    assert "l4, l40s: engines, context and denoiser" in first
    assert "3 layers ME*" in first
    assert "2 layers MM" in second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plans": {"context": {"file": "context.onnx"}}}, "plans: context: sha256` is missing"),
        ({"plans": 3}, "`plans` should be an object, found 3"),
        ({"sku": None}, "`sku` should be a string, found None"),
        ({"limits": []}, "`limits` should be an object"),
        ({"profiles": {"context": 7}}, "`profiles: context` should be a list of objects, found 7"),
    ],
)
def test_malformed_build_record(tmp_path, bundle, changes, message):
    engines = write_engines(tmp_path / "cpu", bundle, **changes)
    assert message in refused(engines)


SOME = "context_tower.layers.0.mixer.A_log"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m.pop("weights"), "the field `weights` is missing"),
        (lambda m: m["graphs"].pop("float32"), "the field `graphs: float32` is missing"),
        (lambda m: m["model"].update(foo=1), "the field `model: foo` is unknown"),
        (lambda m: m.update(dtype="float16"), "float16"),
        (lambda m: m["tensors"].clear(), "which is not among the tensors"),
        (lambda m: m["tensors"][SOME].pop("sample"), f"`tensors: {SOME}: sample` is missing"),
        (lambda m: m["shards"][1].pop("size"), "the field `shards[1]: size` is missing"),
        (lambda m: m.update(towers=[]), "the field `towers` is []"),
        (lambda m: m["weights"].update(context={}), "`weights: context` is missing or empty"),
        (lambda m: m["checkpoint"].update(path=None), "`checkpoint: path` should be a string"),
    ],
)
def test_malformed_manifest_is_one_sentence(tmp_path, bundle, damage, message):
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    manifest = json.loads(path.read_text())
    damage(manifest)
    path.write_text(json.dumps(manifest))
    sentence = refused(tmp_path / "bundle")
    assert sentence.startswith(f"{path}: ")
    assert message in sentence
    assert sentence.count(str(path)) == 1
    with pytest.raises(BundleError) as caught:  # what `twotower verify` starts with
        open_target(tmp_path / "bundle")
    assert str(caught.value) == sentence


class TestFull:
    """Every byte, compared with the digests that the export recorded."""

    def test_digests_are_recorded(self, bundle, checkpoint):
        for shard in json.loads((bundle / "manifest.json").read_text())["shards"]:
            content = (checkpoint / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()

    def test_same(self, bundle):
        assert inspected(bundle, "--full")["checkpoint"]["state"].endswith("every byte of it")

    def test_what_no_sample_meets_is_found(self, tmp_path):
        config = tiny_config("MM", hidden=64)
        folder = write_checkpoint(tmp_path / "c", config, random_tensors(config), shards=1)
        write_bundle(with_full_digests(open_checkpoint(folder)), tmp_path / "bundle")
        path = folder / "model-00001-of-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[10_000] ^= 1  # in the embeddings, before their middle and the file's second sample
        path.write_bytes(content)
        state = inspected(tmp_path / "bundle")["checkpoint"]["state"]
        assert state == "is there; headers and samples are as at export, --full reads every byte"
        sentence = refused(tmp_path / "bundle", "--full")
        assert "not the whole content of model-00001-of-00001.safetensors (sha256 " in sentence

    def test_nothing_to_compare_with(self, tmp_path, checkpoint):
        write_bundle(open_checkpoint(checkpoint), tmp_path / "bundle")
        sentence = refused(tmp_path / "bundle", "--full")
        assert "records no sha256 of model-00001-of-00003.safetensors" in sentence
        assert "export it again with --full" in sentence

    def test_export_records_on_demand(self, tmp_path, checkpoint):
        arguments = [str(checkpoint), str(tmp_path / "bundle"), "--full"]
        assert CliRunner().invoke(export, arguments).exit_code == 0
        assert inspected(tmp_path / "bundle", "--full")["kind"] == "bundle"

    def test_checkpoint_alone(self, checkpoint):
        found = inspected(checkpoint, "--full")
        for file, digest in found["sha256"].items():
            assert digest == hashlib.sha256((checkpoint / file).read_bytes()).hexdigest()
        text = CliRunner().invoke(inspect, [str(checkpoint), "--full"]).stdout
        assert all(f"sha256 {digest}  {file}" in text for file, digest in found["sha256"].items())
        assert "sha256" not in CliRunner().invoke(inspect, [str(checkpoint)]).stdout
        assert "its revision is unknown" in found["warnings"][0]

    def test_engines_have_no_weights(self, tmp_path, bundle):
        engines = write_engines(tmp_path / "cpu", bundle)
        assert "is an engine set, so --full means nothing" in refused(engines, "--full")

    def test_progress(self, bundle):
        seen = []
        inspect_source(str(bundle), progress=lambda *now: seen.append(now), full=True)
        assert "hashing megabytes" in {what for what, _, _ in seen}


def test_unfinished_checkpoint_of_a_bundle(tmp_path, bundle, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    (folder / "tokenizer.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="the download did not finish"):
        inspect_source(str(bundle), folder)


def test_same_weights_in_other_files_are_not_unchanged(tmp_path, bundle):
    other = write_checkpoint(tmp_path / "other", CONFIG, random_tensors(CONFIG), shards=2)
    assert "the same weights in other files: " in refused(bundle, "--checkpoint", other)


class TestTensorRtLlm:
    """What `--target tensorrt-llm` would ignore is refused."""

    @pytest.mark.parametrize("options", [["--towers", "both"], ["--full"]])
    def test_options_without_meaning(self, tmp_path, checkpoint, options):
        arguments = [str(checkpoint), str(tmp_path / "out"), "--target", "tensorrt-llm", *options]
        result = CliRunner().invoke(export, arguments)
        assert isinstance(result.exception, TwoTowerError)
        assert f"{' '.join(options)} means nothing with --target" in str(result.exception)
        assert not (tmp_path / "out").exists()

    def test_the_context_tower_may_be_named(self, tmp_path, checkpoint):
        arguments = [str(checkpoint), str(tmp_path / "out"), "--target", "tensorrt-llm"]
        result = CliRunner().invoke(export, [*arguments, "--towers", "context"])
        assert result.exit_code == 0, result.exception
        usage = CliRunner().invoke(export, ["--help"]).stdout
        assert "CHECKPOINT OUT" in usage


def test_a_plain_folder_is_warned_about_by_export(tmp_path, checkpoint):
    arguments = [str(checkpoint), str(tmp_path / "bundle"), "--json"]
    result = CliRunner().invoke(export, arguments)
    assert f"warning: {checkpoint}: its revision is unknown" in result.stderr
    assert "its revision is unknown" in json.loads(result.stdout)["warnings"][0]


def test_a_bundle_whose_checkpoint_is_another_one_exits_with_1(tmp_path, checkpoint):
    """One that is not here is no fault: a bundle may be on another machine than its weights."""
    folder = shutil.copytree(checkpoint, tmp_path / "c")
    write_bundle(open_checkpoint(folder), tmp_path / "bundle")
    other = write_checkpoint(tmp_path / "other", CONFIG, random_tensors(CONFIG, 5))
    shutil.rmtree(folder)
    assert "no such folder" in inspected(tmp_path / "bundle")["checkpoint"]["state"]
    other.rename(folder)
    result = CliRunner().invoke(inspect, [str(tmp_path / "bundle"), "--json"])
    assert result.exception.exit_code == 1
    assert "is not the checkpoint of this bundle: other values in" in str(result.exception)


def listing(profile, batch):
    """Two kernels: a product of a layer, and one that copies its weight and a cache."""
    weight = Tensor("context_tower.layers.0.mixer.in_proj.weight", (1000, 500), "BF16")
    cache = Tensor("context.layers.2.k_cache", (batch, 2, "context", 8), "BF16")
    new = replace(cache, name="context.layers.2.k_cache_new")
    table = Tensor("context_tower.embeddings.weight", (300, 16), "BF16")
    ids, moved = Tensor("ids", (batch, "tokens"), "INT32"), replace(weight, name="moved")
    product = Kernel("a.gemm", "gemm", 0, (weight, ids, table), (Tensor("y", (batch, 4), "FLOAT"),))
    copy = Kernel("__myl_Tran", "kgen", None, (weight,), (moved,))
    update = Kernel("__myl_Scat", "kgen", 2, (cache, ids), (cache,))
    usual = {"batch": 1, "tokens": 16, "context": 256}
    inputs, kernels = (weight, cache, table, ids), (product, copy, update)
    return Listing(profile, usual, 12_000_000, inputs, (new,), kernels, ("t",))


def listed():
    """A denoiser's kernel that takes a list of rows, and one that takes what it made of them."""
    ids, rows = (
        Tensor("ids", ("batch", "block"), "INT32"),
        Tensor("sampled_rows", ("sampled",), "INT32"),
    )
    logits = Tensor("logits.all", ("batch", "block", 1000), "BF16")
    drawn = Tensor("drawn", ("sampled", "block", 1000), "FLOAT")
    new = Tensor("new_ids", ("batch", "block"), "INT32")
    draw = Kernel("__myl_GathMul", "kgen", None, (logits, rows), (drawn,))
    search = Kernel("__myl_Topk", "kgen", None, (drawn, ids), (new,))
    usual = {"batch": 2, "sampled": 2, "uncertain": 2, "block": 16}
    return Listing("all", usual, None, (ids, rows), (), (draw, search))


def test_a_kernel_writes_no_more_into_its_input_than_there_is():
    """As the one that takes one logit of each position, and puts entropies where they belong."""
    ids = Tensor("ids", ("batch", "block"), "INT32")
    logits = Tensor("logits.all", ("batch", "block", 1000), "BF16")
    entropy = Tensor("entropy", ("batch", "block"), "FLOAT")
    kernel = Kernel("__myl_GathScat", "kgen", None, (logits, entropy), (entropy,))
    usual = {"batch": 2, "block": 16}
    found = traffic_of(Listing("all", usual, None, (ids,), (), (kernel,))).moved
    assert (found.read, found.written) == (2 * 16 * 1000 * 2, 2 * 16 * 4)


def moved(read, written, least):
    bytes_ = {"read_bytes": read, "written_bytes": written, "moved_bytes": read + written}
    return {"kernels": 1, **bytes_, "least_bytes": least}


class TestTraffic:
    @pytest.fixture
    def engines(self, tmp_path, bundle):
        folder = tmp_path / "l4"
        written = tmp_path / "listing.json"
        write_listings(written, "a test", [listing("wide", "batch"), listing("one", 1)])
        digest = hashlib.sha256(written.read_bytes()).hexdigest()
        traffic = {"context": {"file": "context.traffic.json", "sha256": digest}}
        write_engines(folder, bundle, sku="l4", traffic=traffic)
        return shutil.move(written, folder / "context.traffic.json").parent

    def test_the_numbers(self, engines):
        (found,) = inspected(engines, "--traffic")["engines"]
        wide, one = found["towers"]["context"]["profiles"]
        assert [call["sizes"]["batch"] for call in wide["calls"]] == [1, 4]
        assert [call["sizes"]["batch"] for call in one["calls"]] == [1]
        weight, ids, rows, y = 1_000_000, 4 * 64, 64 * 16 * 2, 4 * 4 * 4
        cache, new = 4 * 2 * 256 * 8 * 2, 4 * 2 * 16 * 8 * 2
        call = wide["calls"][1]
        assert call["kinds"] == {
            "M": moved(weight + ids + rows, y, least=weight + ids + rows),
            "*": moved(ids, ids, least=cache + new),
            "ends": moved(weight, weight, least=0),
        }
        assert call["least_bytes"] == weight + ids + rows + cache + new
        assert call["moved_bytes"] == sum(one["moved_bytes"] for one in call["kinds"].values())
        copy = {"kernel": "__myl_Tran", "input": "context_tower.layers.0.mixer.in_proj.weight"}
        assert call["copies"] == [copy | {"bytes": weight}]
        assert [one["layer"] for one in call["each"]] == [0, None, 2]

    def test_rows_that_no_list_names_are_not_counted(self, tmp_path, bundle):
        folder = write_engines(tmp_path / "l4", bundle, sku="l4")
        write_listings(folder / "denoiser.traffic.json", "a test", [listed()])
        digest = hashlib.sha256((folder / "denoiser.traffic.json").read_bytes()).hexdigest()
        build = json.loads((folder / "build.json").read_text())
        build["traffic"] = {"denoiser": {"file": "denoiser.traffic.json", "sha256": digest}}
        (folder / "build.json").write_text(json.dumps(build))
        (found,) = inspected(folder, "--traffic")["engines"]
        (profile,) = found["towers"]["denoiser"]["profiles"]
        calls = [(one["sizes"]["batch"], one["sizes"]["sampled"]) for one in profile["calls"]]
        assert calls == [(1, 0), (4, 0), (1, 1), (4, 4)]
        logits, ids = 4 * 16 * 1000, 4 * 4 * 16
        for call, rows in ((profile["calls"][1], 0), (profile["calls"][3], 1)):
            drawn, numbers = 4 * logits * rows, 4 * 4 * rows
            draw, search = call["each"]
            assert draw["read_bytes"] == 2 * logits * rows + numbers
            assert draw["written_bytes"] == drawn
            assert search["read_bytes"] == drawn + ids
        text = CliRunner().invoke(inspect, [str(folder), "--traffic"]).stdout
        assert "rows  sampled  block" in text
        assert "uncertain" not in text

    def test_the_table(self, engines):
        text = CliRunner().invoke(inspect, [str(engines.parent), "--traffic"]).stdout
        assert "context, profile wide, from a test; 12 MB of scratch at its largest sizes" in text
        assert "M (1 layers)" in text
        assert "context_tower.layers.*.mixer.in_proj.weight: 1 kernel, 1.0 MB" in text
        assert "without a size, and not counted: t" in text

    def test_refusals(self, engines, tmp_path, bundle):
        assert "leave out --checkpoint and --full" in refused(engines, "--traffic", "--full")
        assert "is no engine set, so --traffic means nothing" in refused(bundle, "--traffic")
        cpu = write_engines(tmp_path / "cpu", bundle)
        assert "kernels of these engines are not known: cpu (onnxruntime)" in refused(
            cpu, "--traffic"
        )
        (engines / "context.traffic.json").write_text("{}")
        assert "context.traffic.json: is changed" in refused(engines, "--traffic")


def test_names_in_files_cannot_steer_a_terminal(tmp_path, bundle):
    engines = write_engines(tmp_path / "cpu", bundle, sku="l4\x1b[2J", versions={"a\n": "\x9bm"})
    text = CliRunner().invoke(inspect, [str(engines)]).stdout
    assert r"l4\x1b[2J: onnxruntime" in text
    assert r"(a\n \x9bm)" in text


def test_inspect_and_plan_agree_on_the_gpus():
    """Also on which machines can have two, and what unified memory is free."""
    config, model = full_config(), read_model_size(FULL_SIZE)
    tensors = {name: ("BF16", shape) for name, shape in expected_tensors(config).items()}
    fit = fitting_skus(take_inventory(config, tensors))
    for name, sku in known_skus().items():
        if name == "cpu":  # its memory is this machine's
            continue
        plan = plan_memory(model, PlanRequest(sku, slots=1, context=4096, precision="bf16"))
        planned = len(plan.gpus) if plan.fits else 0
        assert planned == 1 * (name in fit.one) + 2 * (name in fit.one_per_tower), name
