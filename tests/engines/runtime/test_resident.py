"""The resident runtime on a device made of this machine's memory: the CPU flavour's answers."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tests.support import host_device as host
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.closing import check_closing
from twotower_contract.engine_set import Limits
from twotower_contract.errors import CheckpointError
from twotower_contract.layout import ROW_LISTS
from twotower_contract.policies import POLICIES
from twotower_engines.artifacts.weights import WeightStore
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.runtime.resident.calls import CallSize, call_sizes, token_bucket
from twotower_engines.runtime.resident.device import Device
from twotower_engines.runtime.resident.runtime import ResidentRuntime, Tower
from twotower_engines.runtime.resident.states import state_kinds, window_step
from twotower_engines.runtime.resident.upload import input_sizes, tower_bytes, upload_weights
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

LIMITS = Limits(slots=5, context=96, max_tokens_per_call=32, block_size_max=16)


def make_resident(engines, gpus=1, limits=LIMITS, progress=None, **options):
    """The runtime as `loading.open_resident_runtime` makes it, with host engines."""
    store = WeightStore(engines.manifest)
    store.check()
    devices = [host.HostDevice(f"host:{index}") for index in range(gpus)]
    towers = []
    for name, device in (("context", devices[0]), ("denoiser", devices[-1])):
        engine = host.HostEngine(engines.engine_path(name), device, **options)
        towers.append(Tower(engine, device, upload_weights(store, name, device, window=1 << 12)))
    return ResidentRuntime(engines.manifest, limits, *towers, progress)


@pytest.fixture(scope="module")
def engines(random_engines):
    return random_engines("MEM*E*M", seed=11)


@pytest.fixture(scope="module", params=[1, 2], ids=["one-gpu", "two-gpus"])
def resident(engines, request):
    runtime = make_resident(engines.engines, request.param)
    yield runtime
    runtime.close()


def draw_request(number, generator):
    mode = generator.choice(["mask_diffusion", "mask_diffusion", "mock_ar", "ar"])
    return Request(
        request_id=str(number),
        prompt_ids=tuple(generator.randrange(4, 300) for _ in range(generator.randint(1, 50))),
        mode=mode,
        max_new_tokens=generator.randint(1, 30),
        block_size=generator.choice([4, 9, 16]),
        steps=generator.randint(1, 12),
        threshold=generator.uniform(0.05, 0.95),
        policy=generator.choice(list(POLICIES)),
        temperature=generator.choice([0.0, 0.8]),
        seed=generator.randrange(1 << 30),
    )


def answers(runtime, requests):
    scheduler = Scheduler(runtime)
    for request in requests:
        scheduler.submit(request)
    got = {request.request_id: [] for request in requests}
    while not scheduler.idle:
        for event in scheduler.turn():
            assert event.error is None
            got[event.request_id] += event.ids
    return got


def test_answers_are_those_of_the_cpu_flavour(engines, resident):
    generator = random.Random(1)
    requests = [draw_request(number, generator) for number in range(14)]
    assert answers(resident, requests) == answers(engines.runtime, requests)


def test_noise_entropy_and_logits_are_for_calls_that_ask(engines):
    """A call that lists no rows has a size of its own: none of its kernels has anything to do."""
    runtime = make_resident(engines.engines)
    engine = runtime._denoiser.engine
    assert engine.listed == [set()] * 4
    for slot in range(5):
        runtime.reset(slot)
    runtime.extend([ExtendRow(slot, np.arange(5, 13, dtype=np.int32)) for slot in range(5)])
    block = np.full(8, runtime.mask_token_id, np.int32)

    def listed(*rows):
        engine.listed.clear()
        runtime.denoise([DenoiseRow(slot, block, 0.5, 2, *one) for slot, one in enumerate(rows)])
        return engine.listed

    greedy, drawn, unsure = (0.0,), (0.8,), (0.0, POLICIES["entropy"])
    assert listed(greedy, greedy) == [], "prepared when the runtime was made"
    assert listed(greedy, drawn) == [{"sampled_rows"}]
    assert listed(drawn, greedy) == listed(drawn, drawn) == [], "prepared once"
    assert listed(unsure, greedy) == [{"entropy_rows"}]
    assert listed(drawn, unsure) == [{"sampled_rows", "entropy_rows"}]
    assert listed(greedy, greedy) == []
    runtime.predict([PredictRow(0, 7)])
    assert engine.listed == [{"logits_rows"}]
    runtime.close()


def test_engines_that_were_built_before_there_were_lists_answer_alike(engines):
    older = make_resident(engines.engines, has_lists=False)
    assert not {"sampled_rows", "logits_rows"} & set(older._denoiser.engine.inputs)
    generator = random.Random(5)
    requests = [draw_request(number, generator) for number in range(8)]
    assert answers(older, requests) == answers(engines.runtime, requests)
    lists = {size.lists for size, _ in older._calls if size.verb != "extend"}
    assert lists == {frozenset(ROW_LISTS)}, "a size is prepared once"
    older.close()


def test_slots_are_clean_when_they_are_used_again(engines, resident):
    generator = random.Random(2)
    request = draw_request(0, generator)
    first = answers(resident, [request])
    answers(resident, [draw_request(number, generator) for number in range(1, 8)])
    assert answers(resident, [request]) == first


def test_a_call_leaves_the_slots_inside_its_window_alone(resident):
    ids = np.arange(5, 13, dtype=np.int32)
    block = np.full(8, resident.mask_token_id, np.int32)

    def refined():
        row = DenoiseRow(1, block, threshold=1.0, steps_left=1)
        return resident.denoise([row])[0].ids.tolist()

    for slot in range(4):
        resident.reset(slot)
    resident.extend([ExtendRow(1, ids)])
    before = refined()
    resident.extend([ExtendRow(0, ids[:3]), ExtendRow(2, ids[:5])])
    assert resident._lengths[1] == 8
    assert refined() == before


def test_usual_calls_are_prepared_at_once_and_others_on_first_need(engines):
    seen = []
    limits = replace(LIMITS, block_size_max=40, max_tokens_per_call=72)
    runtime = make_resident(
        engines.engines, limits=limits, progress=lambda *told: seen.append(told)
    )
    context, denoiser = runtime._context.engine, runtime._denoiser.engine
    device, room = runtime._denoiser.device, runtime._denoiser.device.room
    blocks = {(row, 16) for row in (1, 2, 4, 5)}
    assert sorted(context.prepared) == sorted([*blocks, (1, 72)])
    assert sorted(denoiser.prepared) == sorted(blocks)
    assert seen == [(done, 9) for done in range(1, 10)]
    assert device.captures == 9, "of context calls too"

    def every_call():
        for slot in range(5):
            runtime.reset(slot)
            for tokens in (1, 3, 17, 32, 38):
                ids = np.full(tokens, 7, np.int32)
                runtime.extend([ExtendRow(slot, ids if tokens < 38 else ids[:2])])
                runtime.denoise([DenoiseRow(slot, ids, threshold=0.5, steps_left=2)])
            runtime.predict([PredictRow(slot, 7)])

    every_call()
    many = len(context.prepared), len(denoiser.prepared), device.captures
    later = [*context.prepared[5:], *denoiser.prepared[4:]]
    # one request pays for one row, or for two where the rows of so small a model are not aligned
    assert {rows for rows, _ in later} <= {1, 2}
    every_call()
    assert (len(context.prepared), len(denoiser.prepared), device.captures) == many
    assert device.room == room, "nothing is allocated later"
    runtime.close()


@pytest.mark.parametrize(
    ("slots", "asked", "window"),
    [
        (16, [0], (0, 1)),
        (16, [13], (13, 1)),
        (16, [4, 5], (4, 2)),
        (16, [5, 6], (4, 4)),
        (16, [7, 8], (0, 16)),
        (16, [9, 12], (8, 8)),
        (5, [4], (4, 1)),
        (5, [3, 4], (0, 5)),
        (6, [4, 5], (4, 2)),
        (3, [1, 2], (0, 3)),
    ],
)
def test_a_window_begins_at_a_multiple_of_its_rows(slots, asked, window):
    """So there are few of them, each with a captured call of its own."""
    runtime = ResidentRuntime.__new__(ResidentRuntime)
    runtime.limits, runtime._step = replace(LIMITS, slots=slots), 1
    assert runtime._window(asked) == window


def test_a_call_that_is_prepared_late_leaves_every_context_as_it_is(engines, resident):
    """Preparing runs the call, also on slots that hold a context."""
    fresh = make_resident(engines.engines, 2)
    ids = np.arange(10, 30, dtype=np.int32)
    answers = []
    for runtime in (resident, fresh):
        runtime.reset(2)
        runtime.extend([ExtendRow(2, ids)])
        if runtime is fresh:
            assert (CallSize("predict", 2, 1), 2) not in runtime._calls
            runtime.reset(3)
            runtime.extend([ExtendRow(2, ids[:1]), ExtendRow(3, ids[:1])])  # two rows, one token
        else:
            runtime.extend([ExtendRow(2, ids[:1])])
        runtime.extend([ExtendRow(2, ids[:16])])
        block = np.full(8, runtime.mask_token_id, np.int32)
        (made,) = runtime.denoise([DenoiseRow(2, block, threshold=0.2, steps_left=1)])
        answers.append((made.ids.tolist(), made.confidence.tolist()))
    assert answers[0][0] == answers[1][0]
    np.testing.assert_allclose(answers[0][1], answers[1][1], rtol=1e-5)
    fresh.close()


@pytest.mark.parametrize(
    ("verb", "tokens", "padded"),
    [
        ("extend", 1, 1),
        ("extend", 2, 16),
        ("extend", 16, 16),
        ("extend", 17, 32),
        ("extend", 64, 64),
        ("extend", 65, 256),
        ("denoise", 1, 16),
        ("denoise", 16, 16),
        ("denoise", 33, 64),
    ],
)
def test_tokens_are_padded_to_what_profiles_are_tuned_for(verb, tokens, padded):
    assert token_bucket(verb, tokens, Limits(16, 8192, 256, 64)) == padded


@pytest.mark.parametrize(
    ("block", "chunk", "blocks"),
    [
        (64, 256, [16, 32, 64]),
        (48, 64, [16, 32, 48]),
        (16, 32, [16]),
        (7, 32, [7]),
        (64, 32, [16, 32, 64]),
    ],
)
def test_blocks_come_in_few_sizes(block, chunk, blocks):
    limits = Limits(slots=3, context=512, max_tokens_per_call=chunk, block_size_max=block)
    sizes = call_sizes("denoise", limits)
    assert sorted({size.tokens for size in sizes}) == blocks
    assert sorted({size.rows for size in sizes}) == [1, 2, 3]
    for verb, most in (("denoise", block), ("extend", chunk)):
        sizes = {size.tokens for size in call_sizes(verb, limits)}
        assert all(token_bucket(verb, count, limits) in sizes for count in range(1, most + 1))
        assert max(sizes) == most


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_is_allocated_is_within_the_memory_plan(engines, gpus):
    """For the limits of the engine set; all of it is allocated when the runtime is made."""
    build = engines.engines.build
    (share,) = build.memory["per_gpu"]
    runtime = make_resident(engines.engines, gpus, build.limits)
    manifest = engines.engines.manifest
    for towers in [("context", "denoiser")] if gpus == 1 else [("context",), ("denoiser",)]:
        device = getattr(runtime, f"_{towers[0]}").device
        used = (1 << 30) - device.room - sum(tower_bytes(manifest, tower) for tower in towers)
        buffers = sum(
            size
            for name, size in share["buffers"].items()
            if ("denoiser" in name) == (towers == ("denoiser",)) or gpus == 1
        )
        # the small inputs, and gaps between tensors: what the plan's 2% are for
        assert used <= sum(share["states"].values()) + buffers + (64 << 10)
    runtime.close()


def test_rows_of_all_layers_come_home_in_few_copies(engines):
    """Not one copy for each layer and row: 929 were counted for 16 rows of the full-size model."""
    runtime = make_resident(engines.engines)
    device = runtime._context.device
    for slot in range(5):
        runtime.reset(slot)
    ids = np.arange(5, 21, dtype=np.int32)

    def copies(slots, **options):
        before = device.copies
        runtime.extend([ExtendRow(slot, ids[:1] if options else ids, **options) for slot in slots])
        return device.copies - before

    assert copies([0, 1, 2, 3, 4]) == 2
    assert copies([3, 1, 2]) == 2
    assert copies([0, 1, 3]) == 2 * 2
    assert copies([0, 2], keep_previous=True) == 2 * (2 + 2)
    before = device.copies
    runtime.reset(1)
    assert device.copies - before == 5
    runtime.close()


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_slot_that_was_given_up_with_nan_is_clean_for_the_next_request(engines, gpus):
    """Attention multiplies what a row does not see by 0, and 0 * NaN is NaN."""
    runtime = make_resident(engines.engines, gpus)
    request = draw_request(0, random.Random(6))
    expected = answers(runtime, [request])
    for states in runtime._all_states():
        for kind, box in states._boxes.items():
            host.view(box.address, box.layer * len(kind.names)).view(np.float32)[:] = np.nan
    assert answers(runtime, [request]) == expected
    runtime.close()


def test_windows_begin_where_states_are_aligned(engines):
    """TensorRT takes tensors at multiples of 256; host engines refuse any other."""
    kinds = state_kinds(engines.engines.manifest.model, LIMITS, 2)
    assert window_step(kinds) > 1
    for kind in kinds:
        assert kind.pitch * kind.parts * window_step(kinds) % 256 == 0
    model = replace(
        engines.engines.manifest.model,
        num_key_value_heads=2, head_dim=128, mamba_num_heads=64, mamba_head_dim=64,
        n_groups=8, ssm_state_size=128, conv_kernel=4,
    )  # fmt: skip
    assert window_step(state_kinds(model, LIMITS, 2)) == 1


def test_engines_that_cannot_be_captured_answer_alike_and_say_so(engines, caplog):
    plain = make_resident(engines.engines, can_capture=False)
    assert plain._denoiser.device.captures == 0
    assert "cannot be captured as CUDA graphs" in caplog.text
    generator = random.Random(4)
    requests = [draw_request(number, generator) for number in range(4)]
    assert answers(plain, requests) == answers(engines.runtime, requests)
    plain.close()


@pytest.mark.parametrize("gpus", [1, 2])
def test_each_device_is_closed_once(engines, gpus):
    runtime = make_resident(engines.engines, gpus)
    devices = {runtime._context.device.name: runtime._context.device}
    devices[runtime._denoiser.device.name] = runtime._denoiser.device
    runtime.close()
    runtime.close()
    assert [device.closes for device in devices.values()] == [1] * gpus


def test_a_closed_runtime_says_so(engines):
    runtime = make_resident(engines.engines)
    check_closing(runtime)


@pytest.mark.parametrize("window", [4096, 1 << 20])
def test_upload_in_windows_keeps_every_byte(engines, window):
    store = WeightStore(engines.engines.manifest)
    device = host.HostDevice()
    seen = []
    addresses = upload_weights(
        store, "denoiser", device, lambda done, total: seen.append((done, total)), window
    )
    for name, weight in store.manifest.weights["denoiser"].items():
        (size,) = input_sizes(store.manifest, weight).values()
        there = host.view(addresses[name], size).view(np.float32)
        np.testing.assert_array_equal(there.reshape(weight.shape), store.float32(weight))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert device.staged == {}, "pinned memory is given back"


def test_a_window_holds_many_small_tensors(engines):
    store = WeightStore(engines.engines.manifest)
    uploads = []

    class Counted(host.HostDevice):
        def upload(self, target, source):
            uploads.append(source.nbytes)
            super().upload(target, source)

    upload_weights(store, "context", Counted(), window=1 << 16)
    total = tower_bytes(store.manifest, "context")
    assert len(uploads) == -(-total // (1 << 16)) < len(store.manifest.weights["context"])


def test_a_shard_that_ends_early_is_named(engines, tmp_path):
    checkpoint = shutil.copytree(engines.checkpoint, tmp_path / "checkpoint")
    store = WeightStore(engines.engines.manifest, checkpoint)
    for path in checkpoint.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    device = host.HostDevice()

    def upload():
        for tower in ("context", "denoiser"):
            upload_weights(store, tower, device)

    with pytest.raises(CheckpointError, match=r"safetensors: ends \d+ bytes before a tensor"):
        upload()
    assert device.staged == {}


def test_no_room_is_said_with_the_device(engines):
    store = WeightStore(engines.engines.manifest)
    with pytest.raises(RuntimeLoadError, match=r"host:0: no room"):
        upload_weights(store, "context", host.HostDevice(room=10_000))


def test_the_host_device_does_all_that_a_device_must():
    asked = {name for name in vars(Device) if not name.startswith("_")}
    assert asked <= set(dir(host.HostDevice()))


@pytest.mark.parametrize(
    ("flavour", "message"),
    [
        ("tensorrt", r"`tensorrt` need the package tensorrt, which is not .*twotower\[tensorrt\]"),
        ("openvino", "`openvino` are not known to this version"),
    ],
)
def test_engines_that_nothing_here_can_run_are_refused(engines, flavour, message):
    build = replace(engines.engines.build, flavour=flavour)
    with pytest.raises(RuntimeLoadError, match=message):
        open_runtime(replace(engines.engines, build=build))


class BfloatEngine:
    """An engine that writes the bits of 1.5 as every logit."""

    inputs = ()

    def __init__(self):
        self.addresses = {}

    def prepare(self, shapes):
        return self

    def bind(self, addresses):
        self.addresses = dict(addresses)

    def can_capture(self):
        return False

    def enqueue(self):
        if "still_masked" in self.addresses:
            host.view(self.addresses["logits"], 2 * 300).view(np.uint16)[:] = 0x3FC0

    def close(self):
        pass


def test_logits_come_in_the_towers_dtype_and_are_widened_for_who_reads_them(engines):
    manifest = replace(
        engines.engines.manifest, model=replace(engines.engines.manifest.model, dtype="bfloat16")
    )
    device = host.HostDevice()
    towers = [Tower(BfloatEngine(), device, {}) for _ in range(2)]
    runtime = ResidentRuntime(manifest, LIMITS, *towers)
    logits = runtime.predict([PredictRow(0, 7)])
    assert logits.dtype == np.float32
    assert logits.tolist() == [[1.5] * 300]
    runtime.close()


def test_the_routers_gate_is_widened_on_its_way(tmp_path):
    """A graph computes with it in float32 and casts nothing at a call."""
    config = tiny_config("E", hidden=32, dtype="bfloat16")
    source = write_checkpoint(tmp_path / "checkpoint", config, random_tensors(config))
    manifest = write_bundle(open_checkpoint(source), tmp_path / "bundle")
    name = "context_tower.layers.0.mixer.gate.weight"
    weight = manifest.weights["context"][name]
    assert (weight.how, weight.dtype, weight.input_dtype) == ("widen", "BF16", "F32")
    graph = onnx.load(tmp_path / "bundle" / manifest.graph("native", "context").file)
    (given,) = (one for one in graph.graph.input if one.name == name)
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    store, device = WeightStore(manifest), host.HostDevice()
    addresses = upload_weights(store, "context", device, window=1 << 12)
    there = host.view(addresses[name], 4 * math.prod(weight.shape)).view(np.float32)
    np.testing.assert_array_equal(there, store.float32(weight).reshape(-1))
    assert there.any()
