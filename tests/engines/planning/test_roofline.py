"""The roofline's arithmetic against hand calculations and against what others measured."""

import json
import re
from dataclasses import replace

import pytest

from tests.support import FULL_SIZE
from twotower_contract.sizes import uniform_experts
from twotower_engines.planning import routing
from twotower_engines.planning.acceptance import Calls, load_acceptance
from twotower_engines.planning.compiled import compiled_tower
from twotower_engines.planning.model_size import read_model_size
from twotower_engines.planning.plan import PlanRequest, plan_memory
from twotower_engines.planning.roofline import (
    BASIS,
    CPU_KERNELS,
    ROWS,
    Machine,
    ar_throughput,
    context_call,
    denoiser_step,
    throughput,
)
from twotower_engines.planning.routing import distinct_experts, load_routing
from twotower_engines.planning.sku_lookup import find_sku

MODEL = read_model_size(FULL_SIZE)
H200 = Machine(find_sku("h200"), "tensorrt", "bf16")
WEIGHTS = ("routed experts", "shared experts", "router", "mamba", "attention", "head")
LAYER_EXPERT_BYTES = 23 * 9_977_856 * 2


def weights(call):
    """Bytes of weights alone: without states and activations."""
    return sum(call.bytes[part] for part in WEIGHTS)


def compiled(tower, way="kernels"):
    return compiled_tower(MODEL.config, tower, way, 2)


# --- routing ---


def test_measured_routing():
    table = load_routing()["denoiser block"]
    assert table[1] == pytest.approx(34.3, abs=0.01)
    assert load_routing()["context token"][1] == 6
    for rows in table.values():
        assert rows < 128
    assert list(table.values()) == sorted(table.values())


def test_the_histogram_is_that_of_the_mean():
    file = json.loads(routing.DATA_FILE.read_text())
    counts = {int(n): c for n, c in file["histogram"]["counts"].items()}
    assert sum(counts.values()) == 210 * 23
    mean = sum(n * c for n, c in counts.items()) / sum(counts.values())
    assert mean == pytest.approx(load_routing()["denoiser block"][1], abs=0.01)
    assert len(file["tables"]["denoiser block"]["rows"]["1"]["per_layer"]) == 23


def test_uniform_routing():
    assert uniform_experts(16, 128, 6) == pytest.approx(68.6, abs=0.05)
    assert uniform_experts(1, 128, 6) == pytest.approx(6)
    for table in load_routing():
        for rows in ROWS:
            measured = distinct_experts(table, rows, 16, 128, 6)
            assert measured <= distinct_experts(table, rows, 16, 128, 6, "uniform") + 1e-9


def test_distinct_experts_between_measurements():
    def at(rows, tokens=16):
        return distinct_experts("denoiser block", rows, tokens, 128, 6)

    values = [at(rows) for rows in range(1, 80)]
    assert values == sorted(values)
    assert at(8, 16) == at(4, 32) == load_routing()["denoiser block"][8]
    assert at(1, 1) == pytest.approx(6)
    assert 6 < at(1, 8) < at(1, 15) < at(1, 16) == pytest.approx(34.3)
    # another model: the formula
    assert distinct_experts("denoiser block", 1, 16, 8, 2) == uniform_experts(16, 8, 2)


# --- bytes ---


def test_bytes_of_one_step_at_the_measured_routing():
    step = denoiser_step(MODEL, H200, 1, 0)
    routed = 34.3 * LAYER_EXPERT_BYTES
    assert step.bytes["routed experts"] == pytest.approx(routed, rel=0.003)
    assert routed == pytest.approx(15.7e9, rel=0.005)
    assert weights(step) == pytest.approx(19.4e9, rel=0.006)
    # beside the weights: states 47 MB, and what kernels hand to each other
    assert step.total_bytes == pytest.approx(weights(step) + 0.3e9, abs=0.1e9)


def test_bytes_of_all_experts():
    bodies = replace(H200, flavour="tensorrt-rtx")
    step = denoiser_step(MODEL, bodies, 1, 0)
    assert step.distinct == 128
    assert weights(step) == pytest.approx(62.45e9, rel=0.001)


def test_bytes_of_one_autoregressive_token():
    call = context_call(MODEL, H200, 1, 0, 1)
    assert call.distinct == 6
    assert weights(call) == pytest.approx(6.5e9, rel=0.01)


@pytest.mark.parametrize(("experts", "gigabytes"), [(60, 31), (69, 35), (90, 45), (128, 62)])
def test_bytes_by_distinct_experts(monkeypatch, experts, gigabytes):
    monkeypatch.setattr(
        "twotower_engines.planning.roofline.distinct_experts", lambda *_: float(experts)
    )
    assert weights(denoiser_step(MODEL, H200, 1, 0)) == pytest.approx(gigabytes * 1e9, rel=0.02)


def test_states_and_activations():
    step = denoiser_step(MODEL, H200, 4, 8192)
    mamba = 46 * 2**20 + 847_872
    assert step.bytes["states"] == 4 * (mamba + 8192 * 6144)
    assert step.bytes["head"] == 352_321_536 * 2
    call = context_call(MODEL, H200, 4, 8192)
    new = 4 * (mamba + 16 * 6144)
    assert call.bytes["states"] == 4 * (mamba + 8192 * 6144) + new
    norms = (53 * 2688 + 23 * 4096) * 2
    for one, tower in ((step, "denoiser"), (call, "context")):
        moved = compiled(tower).moved_bytes(MODEL.config.pattern, 4, 16, 8192)
        assert one.bytes["activations"] == pytest.approx(moved + norms, rel=0.01)


@pytest.mark.parametrize(("sku", "times"), [("a100-80", 3), ("a10", 3), ("h100-sxm", 1)])
def test_caches_are_copied_in_every_call_where_the_compiler_copies_them(sku, times):
    """TensorRT-RTX moves 271 MB more for a layer of the denoiser on 8.6 than on 8.9, at 16 rows."""
    step = denoiser_step(MODEL, Machine(find_sku(sku), "tensorrt", "bf16"), 16, 8192)
    mamba = 16 * (46 * 2**20 + 847_872)
    caches = 16 * 8192 * 6144
    assert step.bytes["states"] == mamba + times * caches
    assert 2 * caches / 6 == pytest.approx(271e6, rel=0.02)


def test_what_counts_the_operators_of_the_cpu_is_said():
    assert not any("onnxruntime" in text for text in BASIS["compiled"])
    (text,) = (text for text in BASIS["assumed"] if "counted by hand" in text)
    numbers = set(map(float, re.findall(r"[0-9.]+", text)))
    assert numbers == {*map(float, CPU_KERNELS.values()), 1.5}


def test_narrow_weights_move_fewer_bytes():
    fp8 = denoiser_step(MODEL, replace(H200, precision="fp8"), 1, 0)
    bf16 = denoiser_step(MODEL, H200, 1, 0)
    assert 0.53 < fp8.total_bytes / bf16.total_bytes < 0.55  # attention and head stay wide
    assert fp8.bytes["time conditioning"] == bf16.bytes["time conditioning"]


# --- operations and time ---


def test_operations_of_one_step():
    step = denoiser_step(MODEL, H200, 1, 0)
    # 3.228 B parameters are active per token, head included; the scan and the scores come on top
    assert sum(step.flops.values()) == pytest.approx(2 * 16 * 3.228e9, rel=0.02)
    assert sum(step.flops.values()) == pytest.approx(0.10e12, rel=0.06)
    bodies = denoiser_step(MODEL, replace(H200, flavour="tensorrt-rtx"), 1, 0)
    assert bodies.flops["routed experts"] == 2 * 16 * 23 * 128 * 9_977_856


def test_time_of_one_step_on_an_h200():
    step = denoiser_step(MODEL, H200, 1, 0)
    launches = compiled("denoiser").call_kernels(MODEL.config.pattern) * 2e-6 + 300e-6
    assert step.seconds["launches"] == pytest.approx(launches)
    assert step.total_seconds == pytest.approx(step.total_bytes / (4.8e12 * 0.896) + launches)
    assert step.total_seconds - launches == pytest.approx(4.5e-3, rel=0.03)


def test_a_captured_call_waits_for_no_host():
    fast = replace(H200, sku=find_sku("b300"))
    for call, tower in ((context_call, "context"), (denoiser_step, "denoiser")):
        count = compiled(tower).call_kernels(MODEL.config.pattern)
        for tokens in (1, 16):
            seconds = call(MODEL, fast, 1, 8192, tokens).seconds["launches"]
            assert seconds == pytest.approx(count * 2e-6 + 300e-6)


def test_a_part_takes_the_longer_of_bytes_and_operations():
    bodies = Machine(find_sku("rtx-pro-6000"), "tensorrt-rtx", "bf16")
    step = denoiser_step(MODEL, bodies, 64, 8192)
    rate = 503.8e12 * 0.6
    assert step.seconds["routed experts"] == pytest.approx(step.flops["routed experts"] / rate)
    assert step.seconds["states"] == pytest.approx(step.bytes["states"] / (1792e9 * 0.9))


def test_new_states_travel_to_the_second_gpu():
    here = context_call(MODEL, H200, 2, 8192)
    there = context_call(MODEL, H200, 2, 8192, to_second_gpu=True)
    mamba = 2 * (46 * 2**20 + 847_872)
    new = mamba + 2 * 16 * 6144
    assert here.seconds["state copies"] == pytest.approx(2 * mamba / (4.8e12 * 0.896))
    assert there.total_seconds - here.total_seconds == pytest.approx(new / 360e9)


def test_rows_cost_more_but_less_than_alone():
    for cost in (denoiser_step, context_call):
        times = [cost(MODEL, H200, rows, 8192).total_seconds for rows in ROWS]
        assert times == sorted(times)
        per_row = [seconds / rows for seconds, rows in zip(times, ROWS, strict=True)]
        assert per_row == sorted(per_row, reverse=True)


def test_uniform_routing_is_the_slow_end():
    for rows in ROWS:
        measured = denoiser_step(MODEL, H200, rows, 8192).total_seconds
        assert measured < denoiser_step(MODEL, H200, rows, 8192, routing="uniform").total_seconds


# --- tokens per second ---


def test_tokens_per_second_of_one_request():
    """A block: as many steps as its calls, and one extension."""
    plan = plan_memory(MODEL, PlanRequest(find_sku("h200"), 1))
    calls = Calls(16, (0.0, 0.0, 0.0, 1.0))  # always four calls
    step = denoiser_step(MODEL, H200, 1, 8192).total_seconds
    extension = context_call(MODEL, H200, 1, 8192).total_seconds
    got = throughput(plan, 1, calls)
    assert got.tokens_per_second == pytest.approx(16 / (4 * step + extension))
    assert got.block_seconds == pytest.approx(4 * step + extension)
    assert got.slow_block_seconds == pytest.approx(got.block_seconds)


def test_tokens_per_second_of_two_requests():
    """Two rows that end a block every other turn share an extension half of the time."""
    plan = plan_memory(MODEL, PlanRequest(find_sku("h200"), 1))
    step = denoiser_step(MODEL, H200, 2, 8192).total_seconds
    one, two = (context_call(MODEL, H200, rows, 8192).total_seconds for rows in (1, 2))
    turn = step + 0.5 * one + 0.25 * two
    got = throughput(plan, 2, Calls(16, (0.0, 1.0)))
    assert got.turn_seconds == pytest.approx(turn)
    assert got.tokens_per_second == pytest.approx(2 * 8 / turn)


def test_batches_give_more():
    plan = plan_memory(MODEL, PlanRequest(find_sku("h200"), 1))
    calls = load_acceptance().calls("code", 0.8)
    rates = [throughput(plan, rows, calls).tokens_per_second for rows in ROWS]
    assert rates == sorted(rates)
    assert [ar_throughput(plan, rows) for rows in (1, 16)] == sorted(
        ar_throughput(plan, rows) for rows in (1, 16)
    )


# --- against measurements of others ---


def test_faster_than_the_reference_on_its_own_gpus():
    """NVIDIA's code on two A100 80 GB: 439 ms a call, 6.1 tokens/s at 0.8, 4.2 autoregressive."""
    plan = plan_memory(MODEL, PlanRequest(find_sku("a100-80"), 2))
    assert plan.fits
    acceptance = load_acceptance()
    machine = Machine(plan.sku, "tensorrt", "bf16")
    step = denoiser_step(MODEL, machine, 1, 8192).total_seconds
    assert 0.010 < step < 0.02 < acceptance.reference.denoiser_call
    got = throughput(plan, 1, acceptance.calls("arithmetic", 0.8)).tokens_per_second
    assert 6.1 < got < 1000
    assert ar_throughput(plan, 1) > 4.2


def test_near_the_best_that_was_measured_on_two_dgx_spark():
    """103.5 ms per denoiser call in bf16, one tower on each machine (drowzeys): bytes bound it."""
    spark = Machine(find_sku("dgx-spark"), "tensorrt", "bf16")
    step = denoiser_step(MODEL, spark, 1, 1024).total_seconds
    assert 0.6 < step / 0.1035 < 1.0
    uniform = denoiser_step(MODEL, spark, 1, 1024, routing="uniform").total_seconds
    assert step < 0.1035 < uniform


def test_other_shapes_and_the_cpu(random_engines):
    model = read_model_size(random_engines("MEM*E").checkpoint)
    plan = plan_memory(model, PlanRequest(find_sku("cpu"), context=512, slots=4))
    machine = Machine(plan.sku, plan.flavour, plan.precision)
    step = denoiser_step(model, machine, 2, 512)
    assert model.config.num_experts_per_tok < step.distinct < model.config.num_experts
    assert 0 < step.total_seconds < 1
    assert throughput(plan, 2, load_acceptance().calls("open", 0.9)).tokens_per_second > 0


def test_a_model_without_experts():
    config = replace(MODEL.config, pattern="M*", num_experts=0, num_experts_per_tok=0)
    call = context_call(replace(MODEL, config=config), H200, 1, 512)
    assert call.bytes["routed experts"] == 0
    assert call.total_seconds > 0
