"""`twotower build`: what an engine set holds, and what is refused before anything is built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tests.support.engine_bundles import json_of, run_build, write_bundle_of
from twotower_contract import progress
from twotower_contract.digests import file_sha256
from twotower_contract.engine_set import BUILD_FILE, open_engine_set
from twotower_contract.errors import BundleError, TwoTowerError
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.cli.build import BuildProgress, build
from twotower_engines.errors import BuildError, PlanError
from twotower_engines.planning import local_gpu, sku_lookup
from twotower_engines.planning.local_gpu import LocalGpu
from twotower_engines.planning.sku_lookup import find_sku


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_bundle_of(tmp_path_factory.mktemp("build"))


@pytest.fixture
def copied(bundle, tmp_path):
    """A bundle that a test may spoil."""
    return shutil.copytree(bundle, tmp_path / "bundle")


@pytest.fixture
def small_gpu(tmp_path):
    """A SKU file of an RTX GPU with next to no memory."""
    path = tmp_path / "small.toml"
    path.write_text(
        'name = "small"\ncompute_capability = "8.9"\nmemory_gib = 0.5\n'
        "bandwidth_gb_s = 100\nbf16_tflops = 10\n"
    )
    return path


def test_an_engine_set_for_the_cpu(bundle, tmp_path):
    made, is_new = build_engines(bundle, tmp_path, BuildOptions(slots=3, context=99))
    assert is_new
    assert made.folder == tmp_path / "cpu"
    record = made.build
    assert (record.sku, record.flavour, record.precision) == ("cpu", "onnxruntime", "float32")
    assert (record.limits.slots, record.limits.context) == (3, 99)
    assert record.limits.max_tokens_per_call == 256 < made.manifest.max_tokens_per_call
    assert record.compute_capability is None
    assert record.bundle_fingerprint == made.manifest.checkpoint.fingerprint
    assert record.versions.keys() == {"twotower", "onnxruntime"}
    assert record.memory["gpus"] == 1
    assert record.memory["fits"] is True
    for tower in ("context", "denoiser"):
        graph = bundle / made.manifest.graph("float32", tower).file
        assert made.engine_path(tower).read_bytes() == graph.read_bytes()
        assert record.graph_sha256[tower] == record.plans[tower].sha256 == file_sha256(graph)
    for file in ("manifest.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made.folder / file).read_bytes() == (bundle / file).read_bytes()
    made.check_engine_files()
    assert [path.name for path in tmp_path.iterdir()] == ["cpu"]


def test_the_context_is_what_the_model_takes_if_that_is_less(bundle, tmp_path):
    made, _ = build_engines(bundle, tmp_path, BuildOptions(max_tokens_per_call=24))
    assert made.build.limits.max_tokens_per_call == 24
    assert made.build.limits.context == min(8192, made.manifest.model.max_position_embeddings)


def test_a_bundle_of_the_context_tower_alone(copied, tmp_path):
    path = copied / "manifest.json"
    values = json.loads(path.read_text())
    values["towers"] = ["context"]
    values["weights"] = {"context": values["weights"]["context"]}
    for graphs in values["graphs"].values():
        del graphs["denoiser"], graphs["refine"]
    path.write_text(json.dumps(values))
    made, _ = build_engines(copied, tmp_path / "engines", BuildOptions())
    assert list(made.build.plans) == ["context"]
    assert made.build.memory["gpus"] == 1


def spoiled(bundle, what):
    manifest = json.loads((bundle / "manifest.json").read_text())
    graph = bundle / manifest["graphs"]["float32"]["denoiser"]["file"]
    if what == "missing":
        graph.unlink()
    if what == "changed":
        graph.write_bytes(graph.read_bytes() + b"\0")
    if what == "no graph":
        graph.write_bytes(b"this is no ONNX file")
        manifest["graphs"]["float32"]["denoiser"]["sha256"] = file_sha256(graph)
        (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "denoiser.onnx: is missing; export"),
        ("changed", "denoiser.onnx: was changed since export"),
        ("no graph", "denoiser.onnx: ONNX Runtime .* refuses it"),
    ],
)
def test_a_spoiled_graph_is_refused_and_nothing_is_left(copied, tmp_path, what, message):
    spoiled(copied, what)
    with pytest.raises(BuildError, match=message):
        build_engines(copied, tmp_path / "engines", BuildOptions())
    assert list((tmp_path / "engines").glob("*")) == []


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="is no bundle"):
        build_engines(tmp_path, tmp_path / "engines", BuildOptions())


H200 = find_sku("h200")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (BuildOptions(slots=257), PlanError, "--slots is 257; 1 to 256"),
        (BuildOptions(context=10**6), PlanError, "--context is 1000000; this model takes 1 to"),
        (
            BuildOptions(H200, precision="fp8"),
            BuildError,
            "--precision is fp8, but the weights of this bundle are in bfloat16: quantize",
        ),
        (BuildOptions(precision="int4"), PlanError, "does not compute in int4"),
        (BuildOptions(precision="int3"), PlanError, "--precision is 'int3'"),
        (BuildOptions(flavour="tensorrt"), PlanError, "cpu is served by onnxruntime"),
        (
            BuildOptions(H200, flavour="tensorrt-rtx"),
            PlanError,
            "h200 is served by tensorrt",
        ),
        (BuildOptions(flavour="openvino"), BuildError, "--flavour is 'openvino'"),
        (BuildOptions(gpus=2), PlanError, "--gpus is 2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked(bundle, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        build_engines(bundle, tmp_path / "engines", options)
    assert not (tmp_path / "engines").exists()


def test_what_does_not_fit_is_refused_with_what_does(bundle, tmp_path, small_gpu):
    options = BuildOptions(find_sku(str(small_gpu)))
    with pytest.raises(PlanError, match=r"do not fit on 1 x small: .* What fits: "):
        build_engines(bundle, tmp_path / "engines", options)
    assert not (tmp_path / "engines").exists()


def test_what_fits_only_narrower_is_refused_until_it_is_quantized(bundle, tmp_path, small_gpu):
    """As the full-size model on an L40S: the manifest's sizes alone decide."""
    wide = shutil.copytree(bundle, tmp_path / "wide")
    manifest = json.loads((wide / "manifest.json").read_text())
    manifest["model"] |= {"num_experts": 128, "moe_intermediate_size": 8192, "hidden_size": 2688}
    (wide / "manifest.json").write_text(json.dumps(manifest))
    small_gpu.write_text(small_gpu.read_text().replace("0.5", "22"))  # fp8 takes 17, bf16 27
    with pytest.raises(PlanError, match=r"in bf16 do not fit .* --precision fp8 .*quantize first"):
        build_engines(wide, tmp_path / "engines", BuildOptions(find_sku(str(small_gpu))))
    assert not (tmp_path / "engines").exists()


def test_a_checkpoint_that_moved_needs_no_new_engines(copied, tmp_path):
    """Its name is no part of the key; the engine set learns where it lies now."""
    first, _ = build_engines(copied, tmp_path / "engines", BuildOptions(slots=1, context=64))
    values = json.loads((copied / "manifest.json").read_text())
    values["checkpoint"]["path"] = "/somewhere/else"
    (copied / "manifest.json").write_text(json.dumps(values))
    again, is_new = build_engines(copied, tmp_path / "engines", BuildOptions(slots=1, context=64))
    assert not is_new
    assert again.build == first.build
    assert str(again.manifest.checkpoint.path) == "/somewhere/else"
    values["checkpoint"]["fingerprint"] = "0" * 64
    (copied / "manifest.json").write_text(json.dumps(values))
    assert build_engines(copied, tmp_path / "engines", BuildOptions(slots=1, context=64))[1]


def test_a_folder_of_something_else_is_left_alone(bundle, tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "thesis.tex").write_text("years of work")
    with pytest.raises(BuildError, match="is there and is no engine set"):
        build_engines(bundle, tmp_path, BuildOptions())
    assert (tmp_path / "cpu" / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["cpu"]


def test_another_build_takes_the_place_of_the_first(bundle, tmp_path):
    first, _ = build_engines(bundle, tmp_path, BuildOptions(slots=1))
    (first.folder / "context.trace").write_text("of a run with the first")
    made, is_new = build_engines(bundle, tmp_path, BuildOptions(slots=2))
    assert is_new
    assert made.build.limits.slots == 2
    assert not (made.folder / "context.trace").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["cpu"]


def invoke(*arguments):
    return CliRunner().invoke(build, [str(argument) for argument in arguments])


def test_the_command_says_what_it_built(bundle, tmp_path):
    arguments = (bundle, tmp_path, "--sku", "cpu", "--slots", 2, "--context", 64)
    first = invoke(*arguments)
    assert first.exit_code == 0, first.output
    assert "onnxruntime, float32, CPU, 2 slots x 64 tokens" in first.stdout
    assert "up to date" in invoke(*arguments).stdout


def test_memory_for_kept_prefixes_is_planned(bundle, tmp_path):
    done = invoke(bundle, tmp_path, "--sku", "cpu", "--context", 64, "--prefix-mib", 3)
    assert done.exit_code == 0, done.output
    [memory] = open_engine_set(tmp_path / "cpu").build.memory["per_gpu"]
    assert memory["states"]["prefixes"] == 3 << 20
    refused = invoke(bundle, tmp_path, "--sku", "cpu", "--context", 64, "--prefix-mib", 10**9)
    assert isinstance(refused.exception, PlanError)


def test_without_a_sku_the_gpu_of_this_machine_is_built_for(bundle, tmp_path, monkeypatch):
    """The CPU is no default: it is never right for a model of the released size."""
    monkeypatch.setattr(sku_lookup, "local_gpu", lambda: None)
    refused = invoke(bundle, tmp_path)
    with pytest.raises(PlanError, match="no NVIDIA GPU to build for; name one, or `--sku cpu`"):
        raise refused.exception
    gpu = LocalGpu("H200", 140 << 30, "9.0")
    monkeypatch.setattr(sku_lookup, "local_gpu", lambda: gpu)
    monkeypatch.setattr(local_gpu, "local_gpu", lambda: gpu)
    with pytest.raises(BuildError, match=r"h200.* tuned on the GPU itself"):
        raise invoke(bundle, tmp_path).exception
    assert list(tmp_path.iterdir()) == []


def test_several_skus_build_what_can_be_built(bundle, tmp_path):
    done = run_build(bundle, "--sku", "cpu,h200", tmp_path, "--json")
    assert done.returncode == 1
    cpu, h200 = json.loads(done.stdout)["engine_sets"]
    assert (cpu["sku"], cpu["built"]) == ("cpu", True)
    assert "tuned on the GPU itself" in h200["error"]
    assert done.stderr.strip() == "error: not built: h200 (1 of 2); the reasons are above"
    assert open_engine_set(tmp_path).build.sku == "cpu"
    assert not (tmp_path / "h200").exists()


def test_a_misspelt_sku_stops_before_the_first_is_built(bundle, tmp_path):
    result = invoke(bundle, tmp_path / "engines", "--sku", "cpu,l40")
    assert isinstance(result.exception, PlanError)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("skus", ["", ",", " "])
def test_no_sku_at_all(bundle, tmp_path, skus):
    assert isinstance(invoke(bundle, tmp_path, "--sku", skus).exception, PlanError)


def test_an_error_has_no_traceback(tmp_path):
    done = run_build(tmp_path, "--sku", "cpu", tmp_path / "engines")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_json_of_a_build(bundle, tmp_path):
    result = json_of(run_build(bundle, "--sku", "cpu", tmp_path, "--json"))
    assert result["engines"] == str(tmp_path / "cpu")
    assert result["built"] is True
    assert result["plans"].keys() == {"context", "denoiser"}
    assert (tmp_path / "cpu" / BUILD_FILE).is_file()


def test_help_is_quick_and_has_examples():
    result = invoke("--help")
    assert "twotower build bundle --sku cpu engines" in result.output
    code = "import sys, twotower_engines.cli.build as m; print('onnx' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_progress_is_quiet_at_first_and_then_rare_in_a_log(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown = BuildProgress("l40s")
    for now[0] in range(0, 31):
        shown("context", f"step {now[0]}")
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "building l40s, 10 s: context: step 10",
        "building l40s, 20 s: context: step 20",
        "building l40s, 30 s: context: step 30",
    ]


def test_every_error_is_one_that_a_user_can_repair():
    assert issubclass(BuildError, TwoTowerError)
    assert BuildError.exit_code == 2
