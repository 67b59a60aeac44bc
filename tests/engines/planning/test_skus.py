"""The SKU table, SKU files, and the detection of this machine's GPU."""

import json
import platform
from dataclasses import replace

import pytest

from twotower_contract.skus import GIB, known_skus
from twotower_engines.errors import PlanError
from twotower_engines.planning.local_gpu import LocalGpu, local_gpu
from twotower_engines.planning.sku_file import precisions_of
from twotower_engines.planning.sku_lookup import find_sku, resolve_skus

NAMES = [
    *("a100-40", "a100-80", "a10", "l4", "l40s", "rtx-4090"),
    *("h100-sxm", "h100-pcie", "h100-nvl", "h200", "gh200"),
    *("b200", "gb200", "b300", "rtx-pro-6000", "rtx-5090", "dgx-spark", "cpu"),
]
RTX = {"rtx-4090", "rtx-5090", "rtx-pro-6000"}
GOOD_FILE = {
    "name": "rtx-6000-ada",
    "compute_capability": "8.9",
    "memory_gib": 47.4,
    "bandwidth_gb_s": 960,
    "bf16_tflops": 182.1,
}


def test_the_table_has_exactly_the_promised_names():
    assert list(known_skus()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name):
    sku = known_skus()[name]
    numbers = {"compute_capability", "memory_gib", "bandwidth_gb_s", "achieved_bandwidth"}
    numbers |= {"arch", "bf16_tflops", "peer_gb_s", "precisions", "flavours"}
    assert numbers <= set(sku.sources)
    assert all(len(source) > 10 or source == "of the machine" for source in sku.sources.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpu"])
def test_precisions_follow_from_the_compute_capability(name):
    sku = known_skus()[name]
    assert sku.precisions == precisions_of(sku.compute_capability)


@pytest.mark.parametrize(
    ("capability", "precisions"),
    [
        ("8.0", ("bf16", "nvfp4", "int4")),
        ("8.6", ("bf16", "nvfp4", "int4")),
        ("8.9", ("bf16", "fp8", "nvfp4", "int4")),
        ("9.0", ("bf16", "fp8", "nvfp4", "int4")),
        ("10.3", ("bf16", "fp8", "nvfp4", "int4")),
        ("12.1", ("bf16", "fp8", "nvfp4", "int4")),
    ],
)
def test_the_support_matrix(capability, precisions):
    assert precisions_of(capability) == precisions


@pytest.mark.parametrize("name", NAMES)
def test_flavours(name):
    wanted = "tensorrt-rtx" if name in RTX else "onnxruntime" if name == "cpu" else "tensorrt"
    assert known_skus()[name].flavour == wanted
    # TensorRT-RTX plans target 8.0, 8.6, 8.9 and 12: never Hopper or data-centre Blackwell
    if known_skus()[name].compute_capability in ("9.0", "10.0", "10.3"):
        assert known_skus()[name].flavours == ("tensorrt",)


def test_memory_is_less_than_the_box_says():
    box = {"a100-40": 40, "a100-80": 80, "h200": 141, "b200": 180, "l40s": 48, "rtx-5090": 32}
    for name, gigabytes in box.items():
        assert 0.9 * gigabytes * 1e9 < known_skus()[name].memory < gigabytes * GIB


def test_the_cpu_has_this_machines_memory():
    cpu = find_sku("cpu")
    assert cpu.memory > 256 << 20
    assert cpu.compute_capability is None
    assert cpu.max_gpus == 1


def test_names_may_be_spelled_freely():
    assert find_sku("H200").name == "h200"
    assert find_sku("RTX PRO 6000").name == "rtx-pro-6000"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("h100", "h100-sxm"), ("a100", "a100-80"), ("rtx4090", "rtx-4090"), ("l40", "l40s")],
)
def test_an_unknown_sku_gets_a_suggestion(typed, meant):
    with pytest.raises(PlanError, match=f"unknown SKU '{typed}': did you mean.*{meant}"):
        find_sku(typed)


def test_a_hopeless_name_gets_the_list():
    with pytest.raises(PlanError, match=r"known are a100-40, .* cpu, local, all"):
        find_sku("quantum-9")


def test_lists_expand_once():
    assert [sku.name for sku in resolve_skus("h200, all")] == ["h200"] + [
        name for name in NAMES if name != "h200"
    ]
    with pytest.raises(PlanError, match="name at least one SKU"):
        resolve_skus(" , ")


# --- local: nvidia-smi is a script here, because this machine may have no GPU ---


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi that prints a line; None takes it off the path."""

    def put(line):
        if line is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f"#!/bin/sh\necho '{line}'\n")
            tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if line else str(tmp_path))

    return put


def test_local_is_found_by_name_with_the_smaller_memory(smi):
    smi("NVIDIA H200, 143771 MiB, 9.0")
    sku = find_sku("local")
    here = replace(known_skus()["h200"], arch=platform.machine())
    assert sku == here  # nvidia-smi counts memory that CUDA does not give
    smi("NVIDIA H200, 71885 MiB, 9.0")
    assert find_sku("local").memory == 71885 << 20  # half of one: a virtual GPU


def test_local_on_unified_memory_takes_the_tables(smi):
    smi("NVIDIA GB10, [N/A], 12.1")
    here = replace(known_skus()["dgx-spark"], arch=platform.machine())
    assert find_sku("local") == here


def test_local_without_a_gpu_says_what_to_do(smi):
    smi(None)
    with pytest.raises(PlanError, match=r"no NVIDIA GPU was found.*or `cpu`"):
        find_sku("local")


def test_local_with_a_broken_driver_is_no_gpu(smi):
    smi("NVIDIA-SMI has failed because it could not communicate with the driver")
    with pytest.raises(PlanError, match="no NVIDIA GPU was found"):
        find_sku("local")


def test_local_with_an_unknown_card_is_planned_as_its_relative(smi):
    smi("NVIDIA H200 NVL, 143771 MiB, 9.0")
    sku = find_sku("local")
    assert (sku.name, sku.title) == ("h200-nvl", "NVIDIA H200 NVL")
    assert sku.memory == int((143771 << 20) * 0.975)
    assert (sku.compute_capability, sku.arch) == ("9.0", platform.machine())
    assert sku.bandwidth == known_skus()["h200"].bandwidth
    assert "assumed: as NVIDIA H200" in sku.sources["bandwidth_gb_s"]
    assert sku.sources["memory_gib"].startswith("nvidia-smi")
    smi("NVIDIA RTX 6000 Ada Generation, 49140 MiB, 8.9")
    sku = find_sku("local")
    assert (sku.name, sku.bandwidth) == ("rtx-6000-ada-generation", known_skus()["l40s"].bandwidth)


def test_local_with_a_capability_of_its_own_asks_for_a_file(smi):
    smi("NVIDIA GeForce GTX 1080, 8192 MiB, 6.1")
    with pytest.raises(PlanError, match=r"'GeForce GTX 1080' \(compute capability 6.1\).*SKU file"):
        find_sku("local")


def test_whether_a_gpu_is_a_sku(smi):
    smi("NVIDIA H200 NVL, 143771 MiB, 9.0")
    gpu = local_gpu()
    assert str(gpu) == "NVIDIA H200 NVL (compute capability 9.0, 140 GiB)"
    assert not gpu.is_a(known_skus()["h200"]), "by its name"
    mine = replace(known_skus()["h200"], name="mine", device_names=())
    assert gpu.is_a(mine)
    assert not gpu.is_a(replace(mine, memory=94 * GIB))
    assert not gpu.is_a(replace(mine, compute_capability="8.9"))
    assert LocalGpu("GB10", None, "12.1").is_a(replace(known_skus()["dgx-spark"], device_names=()))


def test_the_cpus_of_the_machines():
    arm = {name for name, sku in known_skus().items() if sku.arch == "aarch64" and name != "cpu"}
    assert arm == {"gh200", "gb200", "dgx-spark"}
    assert known_skus()["cpu"].arch == platform.machine()


# --- SKU files ---


def test_a_toml_file_adds_a_sku(tmp_path):
    path = tmp_path / "ada.toml"
    path.write_text(
        'name = "rtx-6000-ada"\ncompute_capability = "8.9"\nmemory_gib = 47.4\n'
        "bandwidth_gb_s = 960\nbf16_tflops = 182.1\npeer_gb_s = 25\nachieved_bandwidth = 0.9\n"
    )
    sku = find_sku(str(path))
    assert (sku.name, sku.memory, sku.bandwidth) == ("rtx-6000-ada", int(47.4 * GIB), 960e9)
    assert (sku.achieved, sku.max_gpus, sku.flavour) == (0.9, 2, "tensorrt-rtx")
    assert sku.precisions == ("bf16", "fp8", "nvfp4", "int4")
    assert (sku.arch, sku.device_names) == ("x86_64", ())
    assert sku.sources["memory_gib"] == str(path)
    assert resolve_skus(f"all,{path}")[-1] == sku


def test_a_json_file_does_as_well(tmp_path):
    path = tmp_path / "ada.json"
    path.write_text(json.dumps(GOOD_FILE | {"flavours": ["tensorrt"], "precisions": ["bf16"]}))
    sku = find_sku(str(path))
    assert (sku.max_gpus, sku.flavour, sku.precisions) == (1, "tensorrt", ("bf16",))
    assert sku.achieved == 0.85


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gib": None}, "`memory_gib` is missing"),
        ({"memory_gb": 48}, "unknown key `memory_gb`; did you mean `memory_gib`"),
        ({"memory_gib": -1}, "`memory_gib` is -1, but a positive number"),
        ({"memory_gib": "48"}, "`memory_gib` is '48'"),
        ({"memory_gib": True}, "`memory_gib` is True"),
        ({"achieved_bandwidth": 1.2}, "a share above 0 and at most 1"),
        ({"compute_capability": 8.9}, '`compute_capability` is 8.9, but a text, as "8.9"'),
        ({"precisions": ["fp16"]}, r"`precisions` is \['fp16'\]"),
        ({"precisions": []}, r"`precisions` is \[\]"),
        ({"flavours": "tensorrt"}, "`flavours` is 'tensorrt'"),
        ({"name": "h200"}, "`name` is 'h200', which is taken"),
        ({"name": "../h200"}, "small letters, digits"),
        ({"title": 3}, "`title` is 3"),
        ({"arch": "arm64"}, "`arch` is 'arm64', but x86_64 or aarch64"),
        ({"device_names": "H200"}, "`device_names` is 'H200', but a list of texts"),
    ],
)
def test_a_wrong_file_is_refused_by_key(tmp_path, change, message):
    values = {key: value for key, value in (GOOD_FILE | change).items() if value is not None}
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(values))
    with pytest.raises(PlanError, match=message):
        find_sku(str(path))


def test_files_that_are_no_sku(tmp_path):
    with pytest.raises(PlanError, match="cannot be read"):
        find_sku(str(tmp_path / "absent.toml"))
    (tmp_path / "broken.toml").write_text("name = ")
    with pytest.raises(PlanError, match="is not TOML"):
        find_sku(str(tmp_path / "broken.toml"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="holds a list, not an object"):
        find_sku(str(tmp_path / "list.json"))
