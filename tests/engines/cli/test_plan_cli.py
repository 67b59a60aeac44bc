"""`twotower plan` as a user calls it."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from docs import plan_table
from tests.support import FULL_SIZE, TWOTOWER
from tests.support.command import twotower
from twotower_contract.skus import known_skus
from twotower_engines.cli.plan import plan
from twotower_engines.errors import PlanError
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import PlanRequest
from twotower_engines.planning.plan_report import plan_report
from twotower_engines.planning.plan_text import text_of_many, text_of_one


def run(*arguments):
    """Call the verb in this process; errors of the user come back as the exception."""
    return CliRunner().invoke(plan, [str(argument) for argument in arguments])


def test_all_skus_in_one_table():
    result = run(FULL_SIZE, "--sku", "all")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()[3:22]}
    assert len(rows) == 18
    assert rows["h200"][3:6] == ["yes", "1", "bf16"]
    assert rows["h100-sxm"][3:6] == ["yes", "2", "bf16"]
    assert rows["l40s"][3:6] == ["yes", "2", "fp8"]
    assert rows["a10"][3:6] == ["yes", "2", "int4"]
    assert rows["cpu"][3] == "no"
    assert "What would fit instead" in result.output
    assert "--sku h200 --gpus 1" in result.output


def test_chunks_and_kept_prefixes_are_planned():
    words = ["--sku", "h200", "--chunk", "256", "--prefix-mib", "1024", "--json"]
    (planned,) = json.loads(run(*words).output)["plans"]  # of the released model
    memory = planned["memory"]
    assert memory["max_tokens_per_call"] == 256
    assert memory["gpus"][0]["states"]["prefixes"] == 1024 << 20


def test_an_rtx_card_shows_both_flavours():
    """Built on the card with our kernels, a step reads the routed experts alone."""
    table = run(FULL_SIZE, "--sku", "rtx-pro-6000,h200").output.splitlines()[3:6]
    assert [line.split()[0] for line in table] == ["rtx-pro-6000", "rtx-pro-6000", "h200"]
    assert [line.split()[2] for line in table] == ["tensorrt-rtx", "tensorrt", "tensorrt"]
    bodies, ours = (float(line.split()[11]) for line in table[:2])
    assert ours < bodies / 2.5
    alone = run(FULL_SIZE, "--sku", "rtx-pro-6000").output
    assert "tensorrt      on the GPU, with [kernels]" in alone
    values = json.loads(run(FULL_SIZE, "--sku", "rtx-pro-6000", "--json").output)
    flavours = [one["memory"]["flavour"] for one in values["plans"] + values["other_flavours"]]
    assert flavours == ["tensorrt-rtx", "tensorrt"]
    only = run(FULL_SIZE, "--sku", "rtx-pro-6000", "--flavour", "tensorrt")
    assert "By flavour" not in only.output
    assert "(12.0, tensorrt)" in only.output


def test_the_table_of_the_documents_is_todays():
    """Else `python docs/plan_table.py` writes it."""
    assert plan_table.table() in plan_table.PAGE.read_text(encoding="utf-8")


def test_one_sku_shows_everything():
    result = run(FULL_SIZE, "--sku", "h200")
    assert result.exit_code == 0, result.output
    for text in (
        "63.19 B parameters",
        "FITS: both towers on one GPU, bf16, prefill in chunks of 1024",
        "routed experts       54.71",
        "A slot takes 94.8 MiB: 46.8 MiB of Mamba states and 6,144 B per token",
        "fp8         60.9 GiB  1 x h200",
        "nvfp4       36.0 GiB  1 x h200",
        "Loading reads the weights: 127 s from a disk of 1 GB/s.",
        "Prefill of one request",
        "By threshold, from task `open` to `arithmetic`",
        "Compiled:",
        "Arithmetic:",
        "Measured by others:",
        "Assumed:",
        "matrix products reach 60%",
        "Sources:",
        "430 ms per denoiser call",
    ):
        assert text in result.output, text


def test_json_has_what_the_tables_have():
    result = run(
        FULL_SIZE, "--sku", "h200,a10", "--json", "--threshold", "0.8", "--precision", "bf16"
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.output)
    h200, a10 = values["plans"]
    assert values["model"]["parameters"] == 63_185_902_848
    assert h200["fits"]
    assert h200["buildable"]
    assert h200["memory"]["gpus"][0]["free"] > 0
    assert h200["loading"]["bytes"] == 2 * values["model"]["parameters"]
    assert h200["loading"]["seconds"] == pytest.approx(126.4, abs=0.1)
    assert [call["rows"] for call in h200["roofline"]["context_extension"]] == [
        1, 2, 4, 8, 16, 32, 64,
    ]  # fmt: skip
    steps = h200["roofline"]["denoiser_step_measured_routing"]
    assert steps[0]["distinct_experts"] == pytest.approx(34.3)
    assert h200["tokens_per_second"]["mask_diffusion"]["threshold"] == 0.8
    tasks = h200["tokens_per_second"]["mask_diffusion"]["tasks"]
    assert tasks["arithmetic"]["tokens_per_call"] == pytest.approx(3.1, abs=0.05)
    assert not a10["fits"]
    assert any("h200" in one for one in a10["nearest"])
    assert h200["sku"]["sources"]["memory_gib"]


def test_a_sku_that_does_not_fit_is_refused_after_its_table():
    result = run(FULL_SIZE, "--sku", "a10", "--precision", "bf16")
    assert isinstance(result.exception, PlanError)
    assert "--sku h200 --gpus 1" in str(result.exception)
    assert "DOES NOT FIT" in result.output
    assert "Not even one slot of 4096 tokens fits." in result.output


def test_what_has_no_kernels_is_refused():
    chosen = ("--sku", "rtx-5090", "--precision", "nvfp4", "--flavour", "tensorrt-rtx")
    asked = run(FULL_SIZE, *chosen)
    assert "FITS, but tensorrt-rtx has no kernels for nvfp4" in asked.output
    with pytest.raises(PlanError, match="tensorrt-rtx has no kernels for weights in nvfp4, only"):
        raise asked.exception
    (planned,) = json.loads(run(FULL_SIZE, *chosen, "--json").stdout)["plans"]
    assert (planned["fits"], planned["buildable"]) == (True, False)
    assert run(FULL_SIZE, *chosen[:-2]).exit_code == 0  # TensorRT takes our kernels


def test_options_reach_the_plan():
    result = run(FULL_SIZE, "--sku", "b200", "--slots", "32", "--context", "32768", "--gpus", "2",
                 "--json")  # fmt: skip
    memory = json.loads(result.output)["plans"][0]["memory"]
    assert (memory["slots"], memory["context"], len(memory["gpus"])) == (32, 32768, 2)


def test_plan_takes_what_build_takes(random_engines):
    """Also `--flavour`, `--block-size-max`, and the folder of engine sets."""
    from twotower_engines.cli.build import build

    mine = {option.name: option for option in plan.params}
    writing = {"bundle", "engines", "force", "dry_run", "log", "verbose", "quiet"}
    writing |= {"is_shared"}  # which changes no number of a plan
    names = {option.name for option in build.params} - writing
    assert names <= mine.keys()
    result = run(FULL_SIZE, "--sku", "rtx-pro-6000", "--flavour", "tensorrt",
                 "--block-size-max", "32", "--json")  # fmt: skip
    memory = json.loads(result.stdout)["plans"][0]["memory"]
    assert (memory["flavour"], memory["block_size_max"]) == ("tensorrt", 32)
    refused = run(FULL_SIZE, "--sku", "h200", "--flavour", "tensorrt-rtx")
    with pytest.raises(PlanError, match="h200 is served by tensorrt"):
        raise refused.exception
    folder = random_engines("MEM*E").folder.parent
    assert run(folder, "--sku", "cpu", "--slots", "4").exit_code == 0


def test_a_table_folds_on_a_narrow_terminal(monkeypatch):
    """Each part repeats the names; no terminal, no fold."""
    whole = run(FULL_SIZE, "--sku", "h200,a10").output
    model = read_model_size(FULL_SIZE)
    reports = [plan_report(model, PlanRequest(known_skus()[name]), 0.9) for name in ("h200", "a10")]
    assert text_of_many(reports) + "\n" == whole
    for width in (20, 40, 60, 200):
        table = text_of_many(reports, width).split("\nmemory: ")[0].splitlines()[2:]
        assert all(len(line) <= width for line in table)
        words = {word for line in table for word in line.split()}
        assert words == {word for line in whole.splitlines()[2:5] for word in line.split()}
        assert sum(line.startswith("h200") for line in table) == (1 if width == 200 else
               len([line for line in table if line.startswith("SKU")]))  # fmt: skip


def test_the_tables_of_one_sku_fold_too():
    """What is wider than the terminal then is prose, which the terminal folds."""
    model = read_model_size(FULL_SIZE)
    report, other = (
        plan_report(model, PlanRequest(known_skus()["rtx-pro-6000"], flavour=one), 0.9)
        for one in (None, "tensorrt")
    )
    whole, folded = (text_of_one(report, [other], width) for width in (None, 60))
    assert whole + "\n" == run(FULL_SIZE, "--sku", "rtx-pro-6000").output
    assert set(folded.split()) == set(whole.split())
    assert any("  " in line.strip() for line in whole.splitlines() if len(line) > 60)
    assert not any("  " in line.strip() for line in folded.splitlines() if len(line) > 60)


@pytest.mark.parametrize("verb", ["plan", "build"])
def test_the_shell_completes_skus(verb):
    """As documented: `eval "$(_TWOTOWER_COMPLETE=bash_source twotower)"`."""

    def completed(words):
        environment = {**os.environ, "_TWOTOWER_COMPLETE": "bash_complete"}
        environment |= {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            TWOTOWER, env=environment, capture_output=True, text=True, check=False
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert completed(f"twotower {verb} bundle --sku h200,a1") == [
        "h200,a100-40", "h200,a100-80", "h200,a10",
    ]  # fmt: skip
    assert completed(f"twotower {verb} bundle --sku lo") == ["local"]


def test_a_list_goes_on_where_one_sku_cannot():
    result = run(FULL_SIZE, "--sku", "h200,gh200", "--gpus", "2")
    assert result.exit_code == 0, result.output
    assert "gh200: --gpus is 2, but a machine with NVIDIA GH200 96 GB has one" in result.output
    alone = run(FULL_SIZE, "--sku", "gh200", "--gpus", "2")
    assert isinstance(alone.exception, PlanError)


def test_a_sku_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ncompute_capability = "9.0"\nmemory_gib = 141\nbandwidth_gb_s = 4900\n'
        "bf16_tflops = 990\n"
    )
    result = run(FULL_SIZE, "--sku", path)
    assert result.exit_code == 0, result.output
    assert "mine (9.0, tensorrt): 141.0 GiB" in result.output


def test_a_tiny_checkpoint_and_its_engines_on_the_cpu(random_engines):
    made = random_engines("MEM*E")
    for path in (made.checkpoint, made.checkpoint / "config.json", made.folder):
        result = run(path, "--sku", "cpu", "--slots", "4")
        assert result.exit_code == 0, result.output
        assert "FITS: both towers on this machine, float32" in result.output
        assert "MiB" in result.output
    both = run(made.checkpoint, "--sku", "all")
    assert both.exit_code == 0


def test_a_context_tower_alone(tmp_path):
    values = json.loads((FULL_SIZE / "config.json").read_text())
    values["architectures"] = ["NemotronHForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    result = run(tmp_path, "--sku", "h100-sxm")
    assert result.exit_code == 0, result.output
    assert "FITS: context tower on one GPU" in result.output
    assert "Tokens per second, autoregressive" in result.output
    assert run(tmp_path, "--sku", "all").exit_code == 0
    values = json.loads(run(tmp_path, "--sku", "h100-sxm", "--json").output)["plans"][0]
    assert "mask_diffusion" not in values["tokens_per_second"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sku", "h2000"], "did you mean h200"),
        (["--sku", "h200", "--slots", "0"], "--slots is 0"),
        (["--sku", "h200", "--context", "999999"], "takes 1 to 262144"),
        (["--sku", "h200", "--threshold", "0.2"], "measured from 0.5 to 0.95"),
        (["--sku", "a10", "--precision", "fp8"], "does not compute in fp8"),
    ],
)
def test_refusals(arguments, message):
    result = run(FULL_SIZE, *arguments)
    assert isinstance(result.exception, PlanError)
    with pytest.raises(PlanError, match=message):
        raise result.exception


def test_the_command_line_exits_with_2_and_no_traceback():
    done = twotower("plan", FULL_SIZE, "--sku", "a10", "--precision", "bf16")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 16 slots x 8192 tokens in bf16 do not fit on 2 x a10")


def test_planning_loads_nothing_heavy():
    code = (
        "import sys; from twotower_engines.cli.plan import plan;"
        f"plan.main([{str(FULL_SIZE)!r}, '--sku', 'h200'], standalone_mode=False);"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'tensorrt', 'numpy'};"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
