"""Bundles: what is written, that it is written whole or not at all, and whose checkpoint it is."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from tests.support.checkpoint_files import RawTensor, random_raw, random_tensors, write_checkpoint
from tests.support.sparse_checkpoint import full_config, write_sparse_checkpoint
from twotower_contract.config import config_json
from twotower_contract.errors import BundleError, TwoTowerError
from twotower_contract.layout import expected_tensors
from twotower_contract.manifest import read_manifest
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_engines.planning.sku_lookup import find_sku
from twotower_export import bundle as bundle_module
from twotower_export.agreement import check_agreement
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.cli.export import export, inspect, next_build
from twotower_export.inventory import take_inventory
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

CONFIG = tiny_config("ME*", hidden=16)
FLOAT32 = ("A_log", "gate.weight")


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(CONFIG, float32=FLOAT32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tensors):
    folder = write_checkpoint(tmp_path_factory.mktemp("bundle") / "checkpoint", CONFIG, tensors)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, checkpoint):
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    write_bundle(checkpoint, out)
    return out


def weight_inputs(path):
    """Weight inputs of a graph file: shape and dtype by name."""
    graph = onnx.load(path).graph
    found = {}
    for value in graph.input:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        if 0 not in shape:  # a symbolic dimension has the value 0: no weight has one
            found[value.name] = (shape, onnx.TensorProto.DataType.Name(kind.elem_type))
    return found


def test_manifest_maps_every_weight_input(bundle, checkpoint):
    """The graphs' weight inputs, the map, and the shards' bytes are one story."""
    manifest = read_manifest(bundle)
    stored = {"BF16": "BFLOAT16", "F32": "FLOAT"}
    assert manifest.model.pattern == "ME*"
    assert manifest.towers == ("context", "denoiser")
    for tower, inputs in manifest.weights.items():
        native = weight_inputs(bundle / manifest.graph("native", tower).file)
        wide = weight_inputs(bundle / manifest.graph("float32", tower).file)
        assert set(native) == set(wide) == set(inputs)
        for name, weight in inputs.items():
            sources = [manifest.tensors[source] for source in weight.sources]
            assert native[name] == (weight.shape, stored[sources[0].dtype]), name
            assert wide[name] == (weight.shape, "FLOAT"), name
            parts = [source.shape for source in sources]
            made = {
                "as_is": parts[0],
                "widen": parts[0],
                "stack": (len(parts), *parts[0]),
                "squeeze": tuple(size for size in parts[0] if size != 1),
            }
            assert made[weight.how] == weight.shape
    used = {s for w in manifest.weights.values() for one in w.values() for s in one.sources}
    assert used == set(checkpoint.tensors)


def test_graphs_have_the_recorded_digests_and_say_what_they_are_of(bundle, checkpoint):
    graphs = read_manifest(bundle).graphs
    assert set(graphs) == {"native", "float32"}
    for some in graphs.values():
        assert set(some) == {"context", "denoiser", "refine"}
        for one in some.values():
            content = (bundle / one.file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == one.sha256
            model = onnx.load_from_string(content)
            onnx.checker.check_model(model)
            metadata = {entry.key: entry.value for entry in model.metadata_props}
            assert metadata["fingerprint"] == checkpoint.fingerprint
            assert (
                not model.graph.initializer
                or max(np.prod(one.dims) for one in model.graph.initializer) < 1000
            ), "a bundle holds no weights"


def test_tokenizer_is_copied(bundle, checkpoint):
    assert (bundle / "tokenizer.json").read_bytes() == (
        checkpoint.path / "tokenizer.json"
    ).read_bytes()


def test_everything_in_float32_shares_its_graphs(tmp_path):
    config = tiny_config("ME*", hidden=16, dtype="float32")
    folder = write_checkpoint(tmp_path / "c", config, random_tensors(config, float32=("",)))
    manifest = write_bundle(open_checkpoint(folder), tmp_path / "bundle")
    assert manifest.graphs["native"] == manifest.graphs["float32"]
    assert not (tmp_path / "bundle/graphs/float32").exists()


def test_context_tower_alone(tmp_path, checkpoint):
    manifest = write_bundle(checkpoint, tmp_path / "bundle", towers=("context",))
    assert manifest.towers == ("context",)
    assert set(manifest.graphs["native"]) == set(manifest.weights) == {"context"}


def test_base_checkpoint_feeds_the_same_inputs(tmp_path, bundle):
    tensors = random_tensors(CONFIG, towers=("context",), base=True)
    opened = open_checkpoint(write_checkpoint(tmp_path / "base", CONFIG, tensors))
    weights = write_bundle(opened, tmp_path / "bundle").weights["context"]
    assert list(weights) == list(read_manifest(bundle).weights["context"])
    assert weights["context_lm_head.weight"].sources == ("lm_head.weight",)
    embeddings = weights["context_tower.embeddings.weight"]
    assert embeddings.sources == ("backbone.embeddings.weight",)


def test_export_is_repeatable(tmp_path, checkpoint, bundle):
    write_bundle(checkpoint, tmp_path / "again")
    for file in bundle.rglob("*"):
        if file.is_file():
            assert (tmp_path / "again" / file.relative_to(bundle)).read_bytes() == file.read_bytes()


def test_the_folders_name_changes_no_graph(tmp_path, checkpoint, bundle):
    moved = shutil.copytree(checkpoint.path, tmp_path / "another name")
    manifest = write_bundle(open_checkpoint(moved), tmp_path / "again")
    first = read_manifest(bundle)
    assert manifest.graphs == first.graphs
    assert manifest.checkpoint.path == moved
    path = str(checkpoint.path)
    assert replace(manifest, checkpoint=first.checkpoint) == first
    for file in (tmp_path / "again").rglob("*"):
        content = b"" if file.is_dir() or file.name == "manifest.json" else file.read_bytes()
        assert path.encode() not in content
        assert str(moved).encode() not in content


def test_bundle_is_replaced_and_other_folders_are_not(tmp_path, checkpoint):
    out = tmp_path / "deep" / "bundle"
    write_bundle(checkpoint, out, towers=("context",))
    (out / "stale").write_text("")
    write_bundle(checkpoint, out)
    assert read_manifest(out).towers == ("context", "denoiser")
    assert not (out / "stale").exists()
    with pytest.raises(BundleError, match="holds files that are not a bundle"):
        write_bundle(checkpoint, checkpoint.path)
    with pytest.raises(BundleError, match="is a file"):
        write_bundle(checkpoint, checkpoint.path / "config.json")
    assert [one.name for one in out.parent.iterdir()] == ["bundle"], "temporary folders are left"


def test_failed_export_leaves_nothing(tmp_path, checkpoint, monkeypatch):
    out = tmp_path / "bundle"
    write_bundle(checkpoint, out, towers=("context",))
    before = read_manifest(out)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module.shutil, "copyfile", fail)
    with pytest.raises(BundleError, match="cannot be written: No space left"):
        write_bundle(checkpoint, out)
    assert read_manifest(out) == before
    assert [one.name for one in tmp_path.iterdir()] == ["bundle"]


class TestAgreement:
    """A bundle meets a checkpoint that is not its own."""

    @pytest.fixture
    def refusal(self, tmp_path, bundle):
        def meet(tensors):
            opened = open_checkpoint(write_checkpoint(tmp_path / "other", CONFIG, tensors))
            with pytest.raises(BundleError) as caught:
                check_agreement(read_manifest(bundle), opened)
            return str(caught.value)

        return meet

    def test_its_own(self, bundle, checkpoint):
        check_agreement(read_manifest(bundle), checkpoint)

    def test_its_own_in_other_files(self, tmp_path, bundle, tensors):
        """The runtime maps bytes where the manifest says, so equal tensors are not enough."""
        other = write_checkpoint(tmp_path / "c", CONFIG, tensors, shards=5)
        message = "it holds the same weights in other files: .* export this one"
        with pytest.raises(BundleError, match=message):
            check_agreement(read_manifest(bundle), open_checkpoint(other))
        padded = write_checkpoint(tmp_path / "p", CONFIG, tensors)
        shard = padded / "model-00001-of-00003.safetensors"
        content = shard.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = content[8 : 8 + length] + b" " * 8, content[8 + length :]
        shard.write_bytes(struct.pack("<Q", len(header)) + header + data)
        with pytest.raises(BundleError, match=message):
            check_agreement(read_manifest(bundle), open_checkpoint(padded))

    def test_content_between_the_samples_of_tensors(self, tmp_path, bundle, tensors):
        """The runtime takes samples of the files, too: what it refuses is refused here."""
        name = "context_tower.embeddings.weight"
        raw = tensors[name]
        flipped = RawTensor(raw.dtype, raw.shape, bytes([raw.data[0] ^ 1]) + raw.data[1:])
        other = write_checkpoint(tmp_path / "c", CONFIG, tensors | {name: flipped})
        with pytest.raises(BundleError, match="but not the whole content of model-00001-of-00003"):
            check_agreement(read_manifest(bundle), open_checkpoint(other))

    def test_names_of_a_cache_are_compared(self, tmp_path):
        """The cache calls a shard by its sha256: so every byte counts, for nothing."""
        snapshot = write_sparse_checkpoint(tmp_path, config_json(CONFIG), shards=2)
        manifest = write_bundle(open_checkpoint(snapshot), tmp_path / "bundle")
        shard = snapshot / "model-00002-of-00002.safetensors"
        assert manifest.shards[1].sha256 == shard.resolve().name
        check_agreement(manifest, open_checkpoint(snapshot))
        other = shard.resolve().rename(shard.resolve().with_name("d" * 64))
        shard.unlink()
        shard.symlink_to(other)
        with pytest.raises(BundleError, match=f"{shard.name} .sha256 {'d' * 64}, at export "):
            check_agreement(manifest, open_checkpoint(snapshot))
        shard.unlink()
        other.rename(shard)  # a plain file has no digest to compare
        check_agreement(manifest, open_checkpoint(snapshot))

    def test_swapped_towers(self, refusal, tensors):
        message = refusal({name: tensors[in_other_tower(name)] for name in tensors})
        assert "its towers are swapped: each tower has the other one's tensors; " in message

    def test_swapped_towers_with_their_own_heads(self, refusal, tensors):
        swapped = {n: tensors[in_other_tower(n)] for n in tensors if "lm_head" not in n}
        message = refusal(tensors | swapped)
        assert "its towers are swapped: each tower has the other one's tensors, but its" in message

    @pytest.mark.parametrize("name", ["lm_head.weight", "denoiser_tower.layers.0.mixer.A_log"])
    def test_one_pair_is_no_swap_of_towers(self, refusal, tensors, name):
        other = in_other_tower(name)
        message = refusal(tensors | {name: tensors[other], other: tensors[name]})
        assert "towers are swapped" not in message
        assert "2 of its tensors changed places: " in message
        assert name in message
        assert other in message

    def test_towers_that_are_equal_are_not_swapped(self, refusal, tensors):
        both = {n: tensors[in_other_tower(n)] for n in tensors if n.startswith("denoiser_tower")}
        message = refusal(tensors | both)
        assert "swapped" not in message
        assert "other values in" in message

    def test_shuffled_experts(self, refusal, tensors):
        order = np.random.default_rng(3).permutation(CONFIG.num_experts)
        bank = "denoiser_tower.layers.1.mixer.experts."
        shuffled = {
            f"{bank}{expert}.{kind}.weight": tensors[f"{bank}{source}.{kind}.weight"]
            for expert, source in enumerate(order)
            for kind in ("up_proj", "down_proj")
        }
        message = refusal(tensors | shuffled)
        assert "its experts are shuffled" in message
        assert "denoiser_tower.layers.1.mixer (up_proj.weight)" in message

    def test_other_values(self, refusal, tensors):
        name = "context_tower.layers.1.mixer.experts.3.up_proj.weight"
        message = refusal(tensors | {name: random_raw((16, 16), np.random.default_rng(4))})
        assert f"other values in 1 of {len(tensors)} tensors: {name}" in message

    def test_other_dtypes(self, refusal):
        message = refusal(random_tensors(CONFIG))
        assert "layers.0.mixer.A_log is BF16 [8], not F32 [8]" in message

    def test_wrong_revision(self, tmp_path, refusal):
        """Two snapshots of one repository; the bundle is of one, the other is met."""
        snapshot = write_sparse_checkpoint(tmp_path / "cache", config_json(CONFIG), shards=1)
        old = snapshot.rename(snapshot.parent / ("b" * 40))
        manifest = write_bundle(open_checkpoint(old), tmp_path / "bundle")
        new = write_checkpoint(snapshot, CONFIG, random_tensors(CONFIG, float32=FLOAT32_OF_HOLES))
        with pytest.raises(BundleError, match=f"wrong revision: it is a203.*is {'b' * 40}"):
            check_agreement(manifest, open_checkpoint(new))

    def test_edited_manifest(self, bundle, tmp_path, tensors):
        manifest = read_manifest(bundle)
        head = replace(manifest.tensors["lm_head.weight"], sample="0" * 16)
        manifest = replace(manifest, tensors={**manifest.tensors, "lm_head.weight": head})
        other = tensors | {"lm_head.weight": tensors["context_lm_head.weight"]}
        opened = open_checkpoint(write_checkpoint(tmp_path / "c", CONFIG, other))
        with pytest.raises(BundleError, match="contradicts itself"):
            check_agreement(manifest, opened)


def in_other_tower(name):
    """The name of a tensor's counterpart; its own if it has none."""
    for one, two in (("context_", "denoiser_"), ("denoiser_", "context_")):
        if name.startswith(one + "tower"):
            return name.replace(one, two, 1)
    heads = {"lm_head.weight": "context_lm_head.weight"}
    return (heads | {b: a for a, b in heads.items()}).get(name, name)


FLOAT32_OF_HOLES = ("A_log", "mixer.D", "dt_bias", "e_score_correction_bias")


class TestCommands:
    def test_export_says_what_it_did(self, tmp_path, checkpoint):
        arguments = [str(checkpoint.path), str(tmp_path / "bundle")]
        result = CliRunner().invoke(export, [*arguments, "--json"])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["fingerprint"] == checkpoint.fingerprint
        assert found["towers"] == ["context", "denoiser"]
        text = CliRunner().invoke(export, arguments).stdout
        assert "--sku cpu ENGINES" in text.partition("next: twotower build")[2]

    def test_a_tokenizer_that_lacks_is_said(self, tmp_path, tensors):
        folder = write_checkpoint(tmp_path / "checkpoint", CONFIG, tensors)
        said = CliRunner().invoke(export, [str(folder), str(tmp_path / "bundle")]).stderr
        assert "has no tokenizer.json, so prompts and answers will be token ids" in said
        (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        result = CliRunner().invoke(export, [str(folder), str(tmp_path / "bundle")])
        assert "tokenizer.json: is a Git LFS pointer" in str(result.exception)

    def test_the_hint_is_a_build_that_can_be_done(self, tmp_path):
        """Of the released size: no CPU holds 235 GiB of float32."""
        config = full_config()
        tensors = {name: ("BF16", shape) for name, shape in expected_tensors(config).items()}
        inventory = take_inventory(config, tensors)
        hint = next_build(tmp_path / "a b", inventory, 64 * 2**30)
        assert hint.startswith(f"twotower build '{tmp_path}/a b' --sku h200 ENGINES (or for b200")
        model = ModelSize(config, ("context", "denoiser"), "")
        assert plan_memory(model, PlanRequest(find_sku("h200"))).buildable
        assert next_build(tmp_path, inventory, 2**40).endswith("--sku cpu ENGINES")

    def test_mask_and_towers_reach_the_manifest(self, tmp_path, checkpoint):
        arguments = [str(checkpoint.path), str(tmp_path / "b"), "--mask-token-id", "9"]
        result = CliRunner().invoke(export, [*arguments, "--towers", "context"])
        assert result.exit_code == 0, result.output
        manifest = read_manifest(tmp_path / "b")
        assert (manifest.model.mask_token_id, manifest.towers) == (9, ("context",))

    def test_refusals_carry_exit_code_two(self, tmp_path):
        result = CliRunner().invoke(export, [str(tmp_path), str(tmp_path / "b")])
        assert isinstance(result.exception, TwoTowerError)
        assert result.exception.exit_code == 2

    def test_inspect_bundle(self, bundle, checkpoint, tmp_path):
        found = json.loads(CliRunner().invoke(inspect, [str(bundle), "--json"]).stdout)
        assert found["kind"] == "bundle"
        assert found["checkpoint"]["state"].startswith(
            "is there; headers and samples are as at exp"
        )
        assert {graph["state"] for graph in found["graphs"]} == {"ok"}
        other = write_checkpoint(tmp_path / "other", CONFIG, random_tensors(CONFIG, 5))
        arguments = [str(bundle), "--checkpoint", str(other)]
        result = CliRunner().invoke(inspect, arguments)
        assert isinstance(result.exception, BundleError)

    def test_inspect_sees_a_changed_graph(self, tmp_path, checkpoint):
        write_bundle(checkpoint, tmp_path / "bundle")
        with (tmp_path / "bundle/graphs/context.onnx").open("ab") as stream:
            stream.write(b"\0")
        (tmp_path / "bundle/graphs/refine.onnx").unlink()
        result = CliRunner().invoke(inspect, [str(tmp_path / "bundle"), "--json"])
        assert result.exception.exit_code == 1
        assert "context.onnx is changed; graphs/refine.onnx is missing" in str(result.exception)
        state = {graph["file"]: graph["state"] for graph in json.loads(result.stdout)["graphs"]}
        assert state["graphs/context.onnx"] == "changed"
        assert state["graphs/refine.onnx"] == "missing"
        assert state["graphs/denoiser.onnx"] == "ok"
