"""The benchmarks as far as they run without a GPU, and their PyTorch baselines."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.support.kernel_reference as reference
from benchmarks import denoiser_step as step
from benchmarks import eager
from benchmarks import gpu as first_hour
from benchmarks import kernels as bench
from tests.support import ROOT, kernel_launches
from tests.support.kernel_inputs import (
    MASK,
    block,
    draw_experts,
    draw_mamba,
    draw_router,
    row_tensors,
)
from tests.support.kernel_reference import Row
from tests.support.waiting import wait_until
from twotower_engines.planning.sku_lookup import find_sku


def test_the_refinement_baseline_is_the_op() -> None:
    generator = np.random.default_rng(1)
    logits = torch.from_numpy(generator.normal(0, 3, (4, 8, 120))).float()
    logits[3, 2, 5] = float("nan")
    ids = block(generator, 4, 8, 120, 0.7).astype(np.int32)
    ids[3] = MASK
    rows = [Row(8, 0.3, 4), Row(5, 0.9, 2), Row(8, 0.2, 1), Row(8, 0.2, 3)]
    lengths, threshold, steps, *_ = row_tensors(rows)
    given = (logits, torch.from_numpy(ids), lengths, threshold, steps)
    got = [x.numpy() for x in eager.refine_block(*given, MASK)]
    for b, row in enumerate(rows):
        want = reference.refine_row(logits[b].double().numpy(), ids[b], row, MASK)
        for index in (0, 2, 3):
            np.testing.assert_array_equal(got[index][b], want[index])


def test_the_dense_baseline_is_the_op() -> None:
    args = draw_experts(np.random.default_rng(2), 10, 2, 5, 24, 16)
    args[1][3, 0] = -1
    x, _, weights, up, down = (arg.double().numpy() for arg in args)
    want = reference.sparse_experts(x, args[1].numpy(), weights, up, down, "fp32")
    np.testing.assert_allclose(eager.dense_experts(*args), want, rtol=1e-4, atol=1e-5)


def test_the_router_baseline_is_the_op() -> None:
    given = draw_router(np.random.default_rng(4), [8, 5], 8, 19, 130)
    want, got = kernel_launches.router(*given, 3, True, 2.5), eager.router(*given, 3, True, 2.5)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1][want[0] >= 0], want[1][want[0] >= 0], rtol=1e-5)


def test_the_mamba_baseline_is_the_op() -> None:
    args = draw_mamba(np.random.default_rng(3), 12, [12, 5])
    want = reference.mamba_block_step(*[x.double().numpy() for x in args], 2, 1e-5, "fp32")
    got = eager.mamba_block_step(*args, 2, 1e-5)
    for b, length in enumerate((12, 5)):
        np.testing.assert_allclose(got[0][b, :length], want[0][b, :length], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[1].double(), want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=1e-4, atol=1e-4)


def test_a_failing_case_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "microseconds", lambda call, sets, graph: call(*sets[0]))

    def broken(*_: object) -> None:
        raise ValueError("out of resources: shared memory\nmore")

    case = bench.Case("Op", "one", 1e6, lambda: (), broken, None, tolerance=0.0, most_of_bound=1.5)
    row = bench.expected(case, 1e12)
    assert row.reached == "not measured"
    bench.measure(case, row, compiling=False)
    assert row.reached == "failed"
    page = bench.write(tmp_path, [row], "a GPU", 1e12, on_gpu=True)
    assert "failed; ValueError: out of resources: shared memory |" in page
    (kept,) = tmp_path.glob("kernels-a-gpu-*.json")
    document = json.loads(kept.read_text())
    assert document["rows"][0]["notes"] == ["ValueError: out of resources: shared memory"]
    assert set(document["versions"]) == {"torch", "triton"}


def test_sets_of_inputs_leave_the_cache() -> None:
    """One row of the small ops is 2.6 and 4.2 MB; an H200's cache holds 60."""
    for case in (case for name in ("refine", "mamba") for case in bench.CASES[name]("cpu")):
        assert bench.set_count(case.bytes) * case.bytes > 120e6, case.shape
        few = case.shape.startswith("B=1 ")  # two launches take longer than the bytes
        assert (case.most_of_bound is None) == few, case.shape


def test_the_sweep_of_tiles_is_bounded() -> None:
    assert 20 < len(bench.TILES) <= 60


def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_the_table_says_so(tmp_path: Path) -> None:
    done = run("kernels", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Nothing here was measured" in done.stdout
    (kept,) = tmp_path.glob("kernels-no-gpu-*.json")
    document = json.loads(kept.read_text())
    assert document["measured"] is False
    for row in document["rows"]:
        assert row["bound_us"] > 0
        assert [row[key] for key in ("kernel_us", "eager_us", "compiled_us")] == [None] * 3
        assert row["reached"] == "not measured"
    by_shape = {(row["op"], row["shape"]): row for row in document["rows"]}
    logits = by_shape["RefineBlock", "B=4 S=16 V=131072 bf16"]
    assert logits["megabytes"] == pytest.approx(4 * 16 * 131072 * 2 / 1e6)
    assert kept.with_suffix(".md").read_text().strip() in done.stdout


@pytest.mark.slow
def test_a_tiny_denoiser_step_runs_on_the_kernels() -> None:
    done = run("denoiser_step", "--tiny", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    for ids, still in zip(made["new_ids"], made["still_masked"], strict=True):
        assert ids.count(MASK) == still < 8


def test_the_step_is_held_against_the_roofline_of_the_plan() -> None:
    """One block reads the 34 experts of each layer that were measured, and little else."""
    cost = step.roofline_of(step.FULL, find_sku("h200"), 1, 8192)
    assert cost.distinct == pytest.approx(34, abs=1)
    assert 0.002 < cost.total_seconds < 0.02
    assert 1e10 < cost.total_bytes < 3e10


@pytest.mark.slow
def test_without_a_gpu_the_step_says_its_bounds(tmp_path: Path) -> None:
    done = run("denoiser_step", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.glob("denoiser-step-no-gpu-*.json")
    document = json.loads(kept.read_text())
    assert [line["rows"] for line in document["steps"]] == [1, 4, 16]
    assert [line["step_us"] for line in document["steps"]] == [None] * 3
    assert document["steps"][0]["gigabytes"] == pytest.approx(19.6, abs=0.3)
    assert "nothing is measured" in done.stdout


@pytest.mark.slow
def test_the_first_hour_without_a_gpu_ends_with_its_wall(tmp_path: Path) -> None:
    """Everything imports and is collected, and the bounds stand beside empty times."""
    done = run("gpu", "--output", str(tmp_path))
    assert done.returncode == 1, done.stderr
    (kept,) = tmp_path.glob("first-hour-no-gpu-*.md")
    wall = kept.read_text()
    assert wall.strip() in done.stdout
    assert "this machine has no GPU" in wall
    for line in (
        "test_plugins_through_the_driver",
        "test_boxes_reach_their_rows_only",
        "RefineBlock B=4 S=16 V=131072 bf16",
        "denoise step, 1 row",
    ):
        assert re.search(rf"\| {re.escape(line)} .*not (run|measured)", wall), line
    assert (tmp_path / "log").read_text().count("not measured") > 10


def test_the_first_hour_names_all_packages_that_its_stages_import() -> None:
    """Imports at the top of our own files that a stage loads; those inside functions may skip."""
    stages = ["tests.support.gpu_checks", "benchmarks.kernels", "benchmarks.denoiser_step"]
    tests = [name.removesuffix(".py").replace("/", ".") for name in first_hour.GPU_TESTS]
    code = f"import sys, {', '.join([*stages, *tests, 'tests.conftest'])}\n"
    code += "print(*(m.__file__ for m in [*sys.modules.values()] if getattr(m, '__file__', 0)))"
    command = [sys.executable, "-c", code]
    environment = first_hour.environment()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours = {"engines", "export", "client", "tests", "benchmarks"}
    loaded = [
        path
        for path in map(Path, done.stdout.split())
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ours
    ]
    assert ROOT / "tests/support/gpu_checks.py" in loaded
    imported: set[str] = set()
    for path in loaded:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    others = {name for name in imported if not name.startswith("twotower_")}
    assert others - sys.stdlib_module_names - ours == set(first_hour.NEEDED)


def test_the_first_hour_begins_by_naming_what_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_hour, "NEEDED", ("numpy", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(tmp_path / "results")])
    with pytest.raises(SystemExit) as ended:
        first_hour.main()
    assert ended.value.code == 2
    assert "error: packages that are not installed: no_such_package\n" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_wall_tells_reached_from_missed(tmp_path: Path) -> None:
    measured = {"op": "Op", "shape": "one", "bound_us": 10.0, "kernel_us": 12.0, "of_bound": 1.2}
    rows = [
        {**measured, "most_of_bound": 1.4, "reached": "yes", "notes": []},
        {**measured, "most_of_bound": 1.1, "reached": "no", "notes": []},
        {**measured, "most_of_bound": None, "reached": "-", "notes": []},
        {**measured, "kernel_us": None, "of_bound": None, "reached": "failed", "notes": ["Boom"]},
    ]
    lines = first_hour.kernel_lines({"rows": [{"most_of_bound": 1.4, **row} for row in rows]})
    assert [line.state for line in lines] == ["reached", "missed", "measured", "FAILED"]
    assert "Boom" in lines[3].text
    assert "12.0 us, 1.20 of the bound, goal 1.10" in lines[1].text
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase name="good"><properties>'
        '<property name="opening" value="3 s, 40 MB"/></properties></testcase>'
        '<testcase name="bad"><failure message="no"/></testcase>'
        '<testcase name="left"><skipped message="why"/></testcase></testsuite>'
        "</testsuites>"
    )
    lines = first_hour.test_lines(tmp_path / "tests.xml")
    states = [(line.name, line.state) for line in lines]
    assert states == [("good", "passed"), ("bad", "FAILED"), ("left", "not run")]
    assert lines[0].text == "opening: 3 s, 40 MB"


def test_a_stage_that_hangs_is_ended_and_the_next_one_runs(tmp_path: Path, monkeypatch) -> None:
    log = tmp_path / "log"

    class Begun(subprocess.Popen):
        """Its time is over when it has begun, and not before."""

        def wait(self, timeout=None):
            wait_until(lambda: "begun" in log.read_text().splitlines())
            return super().wait(timeout)

    monkeypatch.setattr(first_hour.subprocess, "Popen", Begun)
    sleep = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"]
    with log.open("w") as out:
        assert first_hour.run_stage("sleep", sleep, 1.0, out) == "ended after 1 s"
        fine = [sys.executable, "-c", "print('fine')"]
        assert first_hour.run_stage("print", fine, 30.0, out) == "ended well"
    assert {"begun", "fine"} <= set(log.read_text().splitlines())
