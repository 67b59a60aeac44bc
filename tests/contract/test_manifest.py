"""Manifests and build records: what is read, and what is refused by name."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from twotower_contract.engine_set import (
    BUILD_FILE,
    BuildRecord,
    EngineFile,
    Limits,
    open_engine_set,
    write_build_record,
)
from twotower_contract.errors import BundleError, EngineSetError
from twotower_contract.manifest import MANIFEST_FILE, read_manifest, write_manifest
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.tiny.checkpoints import write_random_checkpoint

pytestmark = pytest.mark.usefixtures("quick_exports")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    write_random_checkpoint(
        folder / "checkpoint", "M*E", 32, 5, "bfloat16", vocab_size=300, float32_suffixes=("A_log",)
    )
    write_bundle(open_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def values(bundle):
    """The manifest as JSON, to be changed."""
    return json.loads((bundle / MANIFEST_FILE).read_text())


def read(tmp_path, values):
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(values))
    return read_manifest(tmp_path)


def test_a_manifest_is_read_with_types(bundle, values):
    manifest = read_manifest(bundle)
    assert manifest.checkpoint.path == bundle.parent / "checkpoint"
    assert manifest.model.pattern == "M*E"
    assert manifest.model.layers_of_kind == {"M": (0,), "*": (1,), "E": (2,)}
    assert manifest.model.dtype == "bfloat16"
    assert manifest.towers == ("context", "denoiser")
    assert manifest.tensors["context_tower.layers.0.mixer.A_log"].dtype == "F32"
    stacked = manifest.weights["context"]["context_tower.layers.2.mixer.experts.up_proj"]
    assert (stacked.how, stacked.dtype, len(stacked.sources)) == ("stack", "BF16", 8)
    assert stacked.shape == (8, *manifest.tensors[stacked.sources[0]].shape)
    assert len(manifest.tensors) == len(values["tensors"])
    assert manifest.graph("float32", "denoiser").file == "graphs/float32/denoiser.onnx"


def test_writing_inverts_reading(bundle, tmp_path):
    write_manifest(tmp_path, read_manifest(bundle))
    assert read_manifest(tmp_path) == read_manifest(bundle)
    assert (tmp_path / MANIFEST_FILE).read_bytes() == (bundle / MANIFEST_FILE).read_bytes()


def set_at(*path_and_value):
    *path, key, value = path_and_value

    def change(values):
        for step in path:
            values = values[step]
        values[key] = value

    return change


def delete(*path):
    *path, key = path

    def change(values):
        for step in path:
            values = values[step]
        del values[key]

    return change


HEAD = "lm_head.weight"
BROKEN = {
    "another format": (
        set_at("format", "bundle"),
        "is 'bundle' version 1, not 'twotower-bundle' version 1",
    ),
    "a later version": (
        set_at("format_version", 2),
        "version 2, not .* 1; write the bundle again",
    ),
    "no version": (delete("format_version"), "version None, not .* version 1"),
    "a missing field": (delete("model", "head_dim"), "the field `model: head_dim` is missing"),
    "a wrong kind": (
        set_at("model", "head_dim", "8"),
        "`model: head_dim` should be an integer, found '8'",
    ),
    "a truth for a number": (
        set_at("model", "head_dim", True),
        "`model: head_dim` should be an integer, found True",
    ),
    "no list": (set_at("towers", "context"), "`towers` should be a list of strings"),
    "an odd list": (set_at("eos_token_ids", [2, "3"]), "should be a list of integers"),
    "no object": (set_at("model", []), "`model` should be an object"),
    "a shard that is no object": (set_at("shards", [3]), r"`shards\[0\]` should be an object"),
    "a pattern letter": (set_at("model", "pattern", "M-E"), "the letter '-' at layer 1"),
    "a dtype": (set_at("tensors", HEAD, "dtype", "F16"), f"{HEAD} has dtype 'F16', not BF16"),
    "a short range": (set_at("tensors", HEAD, "end", 9), f"{HEAD} lies at bytes .* to 9 of"),
    "an unknown shard": (set_at("tensors", HEAD, "shard", 9), "of shard 9, .* there are 3 shards"),
    "a small shard": (set_at("shards", 2, "size", 700), "ends past the end of model-00003"),
    "an unknown source": (
        set_at("weights", "denoiser", HEAD, "sources", ["nowhere"]),
        "is made of nowhere, which is not among the tensors",
    ),
    "no source": (set_at("weights", "denoiser", HEAD, "sources", []), "is made of nothing"),
    "a wrong shape": (
        set_at("weights", "denoiser", HEAD, "shape", [4, 4]),
        r"1 tensors of shape \[300, 32\] do not make \[4, 4\] by `as_is`",
    ),
    "another way": (
        set_at("weights", "denoiser", HEAD, "how", "tile"),
        "the `how` 'tile', none",
    ),
    "mixed sources": (
        lambda values: values["weights"]["denoiser"][HEAD]["sources"].append(
            "context_tower.layers.0.mixer.A_log"
        ),
        "has sources of several dtypes: BF16, F32",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_manifest_is_refused(values, tmp_path, name):
    change, message = BROKEN[name]
    read(tmp_path, copy.deepcopy(values))  # it was whole
    change(values)
    with pytest.raises(BundleError, match=message):
        read(tmp_path, values)


def test_what_is_no_manifest_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"is no bundle, it holds no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(BundleError, match="is not JSON"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("[]")
    with pytest.raises(BundleError, match="holds a list, not an object"):
        read_manifest(tmp_path)


def test_a_graph_that_is_not_there_is_named(bundle):
    with pytest.raises(BundleError, match=r"no graph float32/verifier, only .*native/context"):
        read_manifest(bundle).graph("float32", "verifier")


RECORD = BuildRecord(
    sku="h200",
    flavour="tensorrt",
    precision="bf16",
    limits=Limits(slots=16, context=2048, max_tokens_per_call=256, block_size_max=64),
    plans={"context": EngineFile("context.plan", "0" * 64)},
    compute_capability="9.0",
    versions={"tensorrt": "10.13"},
    profiles={"context": [{"tokens": [1, 1, 1]}]},
    memory={"gpus": 1},
    key="k",
    extra={"anything": [1, None]},
)


@pytest.fixture
def engines(tmp_path, bundle):
    """ENGINES with two SKUs, of which only the record and the manifest are there."""
    for sku in ("h200", "l4"):
        (tmp_path / sku).mkdir()
        shutil.copy(bundle / MANIFEST_FILE, tmp_path / sku)
        record = RECORD if sku == "h200" else BuildRecord(
            "l4", "tensorrt-rtx", "bf16", RECORD.limits, {}
        )  # fmt: skip
        write_build_record(tmp_path / sku, record)
    return tmp_path


def test_a_build_record_survives_the_disk(engines):
    assert open_engine_set(engines / "h200").build == RECORD
    assert open_engine_set(engines, "h200").build == RECORD
    assert not list(engines.rglob("*.partial"))


def test_the_only_sku_needs_no_name(engines):
    shutil.rmtree(engines / "l4")
    assert open_engine_set(engines).folder == engines / "h200"


def test_engines_that_are_not_there_are_refused(engines, tmp_path):
    with pytest.raises(EngineSetError, match="holds engines for h200, l4; name one with --sku"):
        open_engine_set(engines)
    with pytest.raises(
        EngineSetError, match=r"no engines for `a10` \(found: h200, l4\).* --sku a10"
    ):
        open_engine_set(engines, "a10")
    with pytest.raises(EngineSetError, match="was built for `h200`, not for `l4`"):
        open_engine_set(engines / "h200", "l4")
    with pytest.raises(EngineSetError, match="no such folder"):
        open_engine_set(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineSetError, match="is no engine set"):
        open_engine_set(tmp_path / "empty")


def test_a_broken_record_is_refused(engines):
    path = engines / "h200" / BUILD_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "format_version": 9}))
    with pytest.raises(
        EngineSetError, match=r"version 9, not .* version 1; build the engines again"
    ):
        open_engine_set(engines / "h200")
    del values["limits"]["slots"]
    path.write_text(json.dumps(values))
    with pytest.raises(EngineSetError, match="the field `limits: slots` is missing"):
        open_engine_set(engines / "h200")


@pytest.mark.parametrize(
    ("name", "value"),
    [("slots", 10**9), ("slots", 0), ("context", 10**30), ("max_tokens_per_call", 1025),
     ("block_size_max", -1)],
)  # fmt: skip
def test_limits_that_no_build_has_are_refused(engines, name, value):
    path = engines / "h200" / BUILD_FILE
    values = json.loads(path.read_text())
    values["limits"][name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(EngineSetError, match=f"the field `limits: {name}` is {value}, not 1 to"):
        open_engine_set(engines / "h200")


def test_an_engine_set_without_its_manifest_is_refused(engines):
    (engines / "l4" / MANIFEST_FILE).unlink()
    with pytest.raises(EngineSetError, match=r"manifest.json is missing; build the engines again"):
        open_engine_set(engines / "l4")


def test_plans_are_checked_by_digest(engines):
    opened = open_engine_set(engines / "h200")
    with pytest.raises(EngineSetError, match=r"context.plan: is missing"):
        opened.check_engine_files()
    (engines / "h200" / "context.plan").write_bytes(b"changed")
    with pytest.raises(EngineSetError, match="changed since it was built"):
        opened.check_engine_files()
    with pytest.raises(EngineSetError, match=r"no engine of the denoiser tower \(only context\)"):
        opened.engine_path("denoiser")


def test_endless_nesting_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(BundleError, match="nests too deeply"):
        read_manifest(tmp_path)
