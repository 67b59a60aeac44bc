"""Quantized weights: what the real compiler makes of them, and which flavour builds them."""

from __future__ import annotations

import onnx
import pytest

from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.compiled import compile_graph, compiled
from twotower_contract.traffic import traffic_of
from twotower_engines.building.build import BuildOptions, build_engines
from twotower_engines.building.flavours.tensorrt import TensorRtFlavour
from twotower_engines.errors import BuildError, PlanError
from twotower_engines.planning.sku_lookup import find_sku
from twotower_export.bundle import write_bundle
from twotower_export.checkpoint import open_checkpoint
from twotower_export.quantization.recipe import default_recipe
from twotower_export.quantization.writing import quantize_checkpoint
from twotower_export.tiny.checkpoints import tiny_config

pytestmark = pytest.mark.usefixtures("quick_exports")

pytest.importorskip("tensorrt_rtx", reason="needs `pip install tensorrt-rtx-cu13`")


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_fp8_weights_are_read_as_8_bits_and_never_copied(tmp_path, tower, capability):
    """Layers of the released width at one row: the bar is 1.10 of the least bytes."""
    listing = compiled(tmp_path, tower, 1, 16, 8192, "MEM*EE", capability, "fp8")
    traffic = traffic_of(listing)
    weights = [name for _, name, _ in traffic.copies if not name.startswith("context.")]
    assert not weights
    assert traffic.ratio <= 1.10
    read = {one.name: one.bytes({}) for kernel in listing.kernels for one in kernel.reads}
    (up,) = [size for name, size in read.items() if name.endswith("layers.1.mixer.experts.up_proj")]
    assert up == 128 * 1856 * 2688


@pytest.mark.parametrize(
    ("format_", "capability"),
    [
        ("nvfp4", "12.0"),
        pytest.param("int4", "8.9", marks=pytest.mark.slow),
        pytest.param("fp8", "8.9", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tower", ["context", pytest.param("denoiser", marks=pytest.mark.slow)])
def test_between_our_kernels_no_weight_is_written_out(tmp_path, tower, format_, capability):
    """Codes of 4 bits reach a kernel of ours only; FP8 ones its products, or an experts' kernel."""
    listing = compiled(tmp_path, tower, 1, 16, 8192, "MEM*EE", capability, format_, is_cut=True)
    traffic = traffic_of(listing)
    assert not [name for _, name, _ in traffic.copies if not name.startswith("context.")]
    assert traffic.ratio <= 1.10
    read = {one.name for kernel in listing.kernels for one in kernel.reads}
    narrow = [name for name in read if name.endswith("in_proj.weight")]
    assert not [name for name in read if ".experts." in name]
    assert any(one.type == "FP8" for k in listing.kernels for one in k.reads) == (format_ == "fp8")
    assert narrow, "the Mamba layer before attention keeps its width"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_", "capability", "is_cut"),
    [
        ("fp8", "8.9", False),
        pytest.param("fp8", "12.1", False, marks=pytest.mark.nightly),
        ("int4", "12.0", True),
        ("nvfp4", "12.1", True),
    ],
)
def test_a_whole_tower_of_the_released_size_moves_little_more_than_it_must(
    tmp_path, format_, capability, is_cut
):
    listing = compiled(tmp_path, "denoiser", 1, 16, 8192 + 256, None, capability, format_, is_cut)
    traffic = traffic_of(listing)
    assert traffic.ratio <= 1.10
    assert not traffic.copies


@pytest.mark.slow
@pytest.mark.parametrize("is_input", [True, False])
def test_4_bits_as_inputs_are_written_out_in_bf16_under_tensorrt_rtx(tmp_path, is_input):
    """The reason that `tensorrt-rtx` is not in `BUILT` for them; as a constant they are not."""
    K, N, group, kinds = 1024, 512, 64, onnx.TensorProto
    helper = onnx.helper
    weights = {"w": (kinds.INT4, [K, N]), "scale": (kinds.BFLOAT16, [K // group, N])}
    x = helper.make_tensor_value_info("x", kinds.BFLOAT16, ["tokens", K])
    inputs, held = [x], []
    for name, (kind, shape) in weights.items():
        if is_input:
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
        else:
            size = K * N // 2 if name == "w" else 2 * (K // group) * N
            content = bytes(index * 31 % 251 % 64 for index in range(size))
            held.append(helper.make_tensor(name, kind, shape, content, raw=True))
    nodes = [
        helper.make_node("DequantizeLinear", [*weights], ["wide"], axis=0, block_size=group),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    y = helper.make_tensor_value_info("y", kinds.BFLOAT16, ["tokens", N])
    graph = helper.make_graph(nodes, "product", inputs, [y], initializer=held)
    opsets = [helper.make_opsetid("", 24)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "g.onnx")
    listing = compile_graph(tmp_path / "g.onnx", {"tokens": 16}, "12.0")
    written = [one for kernel in listing.kernels for one in kernel.writes]
    assert any(one.type == "BF16" and one.bytes({}) == 2 * K * N for one in written) == is_input


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Small bundles of one checkpoint, by format; context towers only."""
    folder = tmp_path_factory.mktemp("quantized")
    config = tiny_config("ME", hidden=32)
    tensors = random_tensors(config, towers=("context",))
    source = open_checkpoint(write_checkpoint(folder / "source", config, tensors))
    bundles = {}
    for format_ in ("fp8", "int4"):
        quantize_checkpoint(source, folder / format_, default_recipe(source, format_))
        bundles[format_] = folder / f"{format_}-bundle"
        write_bundle(open_checkpoint(folder / format_), bundles[format_])
    return bundles


@pytest.mark.parametrize("sku", ["l40s", pytest.param("rtx-5090", marks=pytest.mark.slow)])
def test_an_fp8_bundle_is_built_ahead_of_time(quantized, tmp_path, monkeypatch, sku):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = BuildOptions(find_sku(sku), slots=2, context=64, flavour="tensorrt-rtx")
    engines, _ = build_engines(quantized["fp8"], tmp_path / "engines", options)
    assert (engines.build.flavour, engines.build.precision) == ("tensorrt-rtx", "fp8")


@pytest.mark.parametrize(
    ("format_", "options", "message"),
    [
        ("int4", {"flavour": "tensorrt-rtx"}, "tensorrt-rtx has no kernels for weights in int4"),
        ("fp8", {"precision": "bf16"}, "are stored in fp8; leave the option out"),
    ],
)
def test_what_has_no_kernels_is_refused(quantized, tmp_path, format_, options, message):
    asked = BuildOptions(find_sku("l40s"), slots=2, context=64, **options)
    with pytest.raises(PlanError, match=message):
        build_engines(quantized[format_], tmp_path / "engines", asked)
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize("sku", ["rtx-5090", "h200", "a10"])
def test_codes_of_4_bits_are_for_our_kernels(quantized, tmp_path, monkeypatch, sku):
    """On every GPU; TensorRT alone takes them, which builds on the GPU itself."""
    asked = BuildOptions(find_sku(sku), slots=2, context=64)
    with pytest.raises(BuildError, match=f"engines for {sku} are tuned on the GPU") as refused:
        build_engines(quantized["int4"], tmp_path / "engines", asked)
    assert "--flavour tensorrt-rtx" not in str(refused.value)
    monkeypatch.setattr(TensorRtFlavour, "has_kernels", lambda self: False)
    with pytest.raises(PlanError, match=r"pip install 'twotower\[kernels\]'"):
        build_engines(quantized["int4"], tmp_path / "engines", asked)
