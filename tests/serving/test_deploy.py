"""The recipes of docs/deploy, read by the tools that they are for; and nginx before real servers.

Where nginx or promtool, which are Debian's, are not installed, their tests are skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml

import twotower_client as tt
from tests.support import ROOT, TWOTOWER
from tests.support.command import twotower
from tests.support.served import LONG, freed_early
from tests.support.waiting import wait_until
from twotower_engines.runtime.resident.tensorrt_engine import EXTRAS

DEPLOY = ROOT / "docs" / "deploy"
needs_nginx = pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")


def documents(file: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


@pytest.mark.parametrize(
    ("file", "tool"),
    [
        ("kubernetes.yaml", "kubernetes-validate --strict"),
        ("compose.yaml", "check-jsonschema --builtin-schema vendor.compose-spec"),
    ],
)
def test_a_recipe_keeps_to_its_schema(file, tool) -> None:
    program, *options = tool.split()
    command = [Path(sys.executable).with_name(program), *options, DEPLOY / file]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_pods_of_a_deployment_are_found_and_outlive_the_grace() -> None:
    kinds = {one["kind"]: one for one in documents("kubernetes.yaml")}
    pod = kinds["Deployment"]["spec"]["template"]
    for kind, place in (("Service", "selector"), ("PodMonitor", "selector.matchLabels"),
                        ("Deployment", "selector.matchLabels"),
                        ("PodDisruptionBudget", "selector.matchLabels")):  # fmt: skip
        labels = kinds[kind]["spec"]
        for key in place.split("."):
            labels = labels[key]
        assert labels.items() <= pod["metadata"]["labels"].items(), kind
    [container] = pod["spec"]["containers"]
    grace = int(container["args"][container["args"].index("--grace") + 1])
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert grace + before < pod["spec"]["terminationGracePeriodSeconds"]
    [scaled] = documents("keda.yaml")
    assert scaled["spec"]["scaleTargetRef"]["name"] == kinds["Deployment"]["metadata"]["name"]


@pytest.mark.parametrize("file", ["kubernetes.yaml", "kserve.yaml"])
def test_probes_wait_for_the_released_weights(file) -> None:
    """As long as `twotower plan` says that loading takes, where they fit on one GPU."""
    planned = json.loads(twotower("plan", "--sku", "h200", "--json").stdout)["plans"][0]
    loading = planned["loading"]["seconds"]
    assert loading > 100
    spec = documents(file)[0]["spec"]
    pod = spec["predictor"] if file == "kserve.yaml" else spec["template"]["spec"]
    [container] = pod["containers"]
    live, stalled = container["livenessProbe"], container["args"].index("--stall-timeout") + 1
    patience = live["periodSeconds"] * live["failureThreshold"]
    start = container.get("startupProbe")  # KServe has none: it waits before the first question
    first = (
        start["periodSeconds"] * start["failureThreshold"] if start else live["initialDelaySeconds"]
    )
    assert first > 2 * loading
    assert patience > float(container["args"][stalled]) + loading
    mounts, volumes = container["volumeMounts"], pod["volumes"]
    assert {one["mountPath"] for one in mounts} == {"/engines", "/checkpoint", "/dev/shm"}
    assert {one["name"] for one in mounts} == {one["name"] for one in volumes}


@pytest.mark.parametrize("file", ["kubernetes.yaml", "kserve.yaml"])
def test_probes_are_commands_that_there_are(file) -> None:
    probes = []

    def look(node: object) -> None:
        if isinstance(node, dict):
            probes.extend(value for key, value in node.items() if key.endswith("Probe"))
            for value in node.values():
                look(value)
        elif isinstance(node, list):
            for value in node:
                look(value)

    look(documents(file))
    assert len(probes) >= 2
    for probe in probes:
        program, *words = probe["exec"]["command"]
        assert program == "twotower"
        ran = twotower(*words, "--url", "127.0.0.1:9")
        assert ran.returncode == 1, ran.stderr  # no server is there; 2 would be a wrong option
        assert float(words[words.index("--timeout") + 1]) < probe["timeoutSeconds"]


def test_the_alert_of_a_silent_server_finds_its_job_wherever_prometheus_runs() -> None:
    """The operator's job has the monitor's own name, but where a label of the pods gives one."""
    kinds = {one["kind"]: one for one in documents("kubernetes.yaml")}
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    job = labels[kinds["PodMonitor"]["spec"]["jobLabel"]]
    [scrape] = documents("prometheus.yml")[0]["scrape_configs"]
    assert scrape["job_name"] == job
    alerts = {one["alert"]: one["expr"] for one in documents("alerts.yml")[0]["groups"][0]["rules"]}
    assert alerts["TwoTowerDown"] == f'up{{job="{job}"}} == 0'


def test_compose_names_files_and_ports_that_there_are() -> None:
    [compose] = documents("compose.yaml")
    services = compose["services"]
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    mounted = [one for name in ("prometheus", "grafana") for one in services[name]["volumes"]]
    assert len(mounted) == 5
    for volume in mounted:
        assert (DEPLOY / volume.split(":")[0]).is_file()
    [scrape] = documents("prometheus.yml")[0]["scrape_configs"]
    [target] = scrape["static_configs"][0]["targets"]
    assert target.split(":")[0] in services


def has_compose() -> bool:
    with contextlib.suppress(OSError):
        return not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    return False


@pytest.mark.skipif(not has_compose(), reason="`docker compose` is not installed")
def test_compose_reads_its_file() -> None:
    command = [
        "docker",
        "compose",
        "-f",
        str(DEPLOY / "compose.yaml"),
        "config",
        "--format",
        "json",
    ]
    environment = {**os.environ, "PACKAGE_OPTIONS": "--slots 8", "ENGINES": "/data/engines"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    services = json.loads(ran.stdout)["services"]
    assert services["server"]["environment"] == {"PACKAGE_OPTIONS": "--slots 8"}
    assert "/data/engines" in [one["source"] for one in services["server"]["volumes"]]
    for name in ("prometheus", "grafana"):
        assert all(Path(one["source"]).is_file() for one in services[name]["volumes"])


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    """Each file lies where Grafana looks for it, and points at what there is."""
    services = documents("compose.yaml")[0]["services"]
    inside = dict(reversed(one.split(":")[:2]) for one in services["grafana"]["volumes"])
    looked_at = "/etc/grafana/provisioning"
    [sources] = [
        DEPLOY / inside[one] for one in inside if one.startswith(f"{looked_at}/datasources/")
    ]
    [boards] = [
        DEPLOY / inside[one] for one in inside if one.startswith(f"{looked_at}/dashboards/")
    ]
    [source] = yaml.safe_load(sources.read_text())["datasources"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert (source["type"], host in services, port) == ("prometheus", True, "9090")
    [provider] = yaml.safe_load(boards.read_text())["providers"]
    [board] = [
        file for path, file in inside.items() if path.startswith(provider["options"]["path"])
    ]
    assert board == "./grafana.json"
    asked = json.loads((DEPLOY / board).read_text())["templating"]["list"][0]
    assert (asked["type"], asked["query"]) == ("datasource", source["type"])


@pytest.mark.parametrize("options", ["", " --slots 8 --prefix-mib 4096 --max-waiting 64"])
def test_the_entry_point_of_the_image_gives_options_that_there_are(tmp_path, options) -> None:
    """The shell's line, with a `twotower` that only says what it was given."""
    text = (DEPLOY / "Dockerfile").read_text()
    words = json.loads(text.partition("ENTRYPOINT ")[2])
    stand_in = tmp_path / "twotower"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOST": "0.0.0.0"}
    environment["PACKAGE_OPTIONS"] = options
    said = subprocess.run(
        [*words, "--grace", "45"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said == [
        f"package /engines repository --checkpoint /checkpoint --force{options}",
        "serve repository --host 0.0.0.0 --log-json --log /dev/stderr --grace 45",
    ]
    for line in said:
        verb, *given = line.split()
        help_ = twotower(verb, "--help").stdout
        assert all(word in help_ for word in given if word.startswith("--"))


def test_the_image_has_the_package_and_what_a_gpus_engines_need(tmp_path, wheel) -> None:
    """Built of nothing but the files that the image gets, the wheel is the one of the checkout."""
    [extras] = re.findall(r"ARG EXTRAS=(\S+)", (DEPLOY / "Dockerfile").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"build", EXTRAS["tensorrt"]} <= set(extras.split(","))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    everything, *kept, _ = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]  # fmt: skip
    assert everything == "*"
    for one in kept:
        source = ROOT / one.removeprefix("!")
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (tmp_path / one[1:]).parent.mkdir(exist_ok=True)
        copy(source, tmp_path / one[1:])
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    [made] = (tmp_path / "dist").glob("*.whl")
    assert zipfile.ZipFile(made).namelist() == zipfile.ZipFile(wheel).namelist()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextlib.contextmanager
def balancer(folder: Path, *servers: str) -> Iterator[tuple[str, bytes]]:
    """Run nginx with the recipe's configuration; give its address and certificate."""
    certificate = folder / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", folder / "server.key", "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    config = (DEPLOY / "nginx.conf").read_text()
    for name, address in zip(("server-a:8001", "server-b:8001", "8443"), (*servers, str(port))):  # noqa: B905 - a test may give one server
        config = config.replace(name, address)
    (folder / "nginx.conf").write_text(config)
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf"]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True)
    assert tried.returncode == 0, tried.stderr
    running = subprocess.Popen(
        [*command, "-g", "daemon off;"], stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_until(lambda: listens(port))
        yield f"localhost:{port}", certificate.read_bytes()
    finally:
        running.terminate()
        running.communicate(timeout=20)


@needs_nginx
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
@pytest.mark.slow  # servers of its own
@pytest.mark.server
def test_the_page_leads_from_nothing_to_a_deployment(tmp_path) -> None:
    """All commands of the section but those that install, at free ports."""
    page = (ROOT / "docs/deploy.md").read_text()
    section = page.partition("## From nothing")[2].partition("\n## ")[0]
    install, *blocks = re.findall(r"```sh\n(.*?)```", section, re.S)
    assert "pip install" in install
    script = "set -e\ntrap 'kill $(jobs -p); wait' EXIT\n" + "".join(blocks)
    ports = {port: str(free_port()) for port in ("8001", "8002", "8011", "8012", "8443", "9091")}
    for kind in ("server-a:8001", "server-b:8001", "server:8002"):  # names in the recipes
        script = script.replace(kind, kind.replace(":80", ":_80"))
    for port, free in ports.items():
        script = re.sub(rf"\b{port}\b", free, script)
    script = script.replace(":_80", ":80")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    script = script.replace("| install", f"| sed s/8443/{ports['8443']}/ | install")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Mia" in ran.stdout
    [counted] = json.loads(ran.stdout.splitlines()[-1])["data"]["result"]
    assert float(counted["value"][1]) == 1
    made = tmp_path / "demo/deployment"
    assert '"tenant-a"' in (made / "access.log").read_text()
    for secret in ("server.key", "tenant-a.key", "servers.key", "nginx.conf"):
        assert (made / secret).stat().st_mode & 0o77 == 0, secret


class Keyed(grpc.AuthMetadataPlugin):
    """Sends a tenant's key with each call."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, context, callback) -> None:
        callback((("x-api-key", self.key),), None)


def connect(address: str, certificate: bytes, key: str = "change-me-a") -> tt.TwoTowerClient:
    credentials = grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(certificate), grpc.metadata_call_credentials(Keyed(key))
    )
    return tt.TwoTowerClient(address, timeout=60, credentials=credentials)


@needs_nginx
@pytest.mark.server
def test_nginx_streams_checks_keys_and_passes_over_a_server_that_is_gone(
    server, client, tmp_path
) -> None:
    with balancer(tmp_path, server.grpc_address, f"127.0.0.1:{free_port()}") as (address, trusted):
        expected = client.generate(prompt_ids=[5], max_new_tokens=64)
        with connect(address, trusted) as balanced:
            for _ in range(4):  # every second one would go to the server that is gone
                answer = balanced.generate(prompt_ids=[5], max_new_tokens=64)
                assert answer.ids == expected.ids
            # Blocks pass one by one, before the answer is complete, and so does its leaving.
            with freed_early(client), balanced.stream(prompt_ids=[5], **LONG) as stream:
                next(stream)
        with connect(address, trusted, "guessed") as stranger, pytest.raises(tt.ClientError):
            stranger.generate(prompt_ids=[5], max_new_tokens=4)
    calls = [line.split()[1:4] for line in (tmp_path / "access.log").read_text().splitlines()]
    method = "/inference.GRPCInferenceService/ModelStreamInfer"
    assert ['"tenant-a"', method, "200"] in calls
    assert ['""', method, "401"] in calls


@needs_nginx
@pytest.mark.slow
@pytest.mark.server
def test_a_server_that_is_killed_under_load_loses_nothing_silently(packaged, tmp_path) -> None:
    """Every request ends in the right answer, or in an error after which the same one works."""
    from twotower_engines.serving.server import ServerOptions, TritonServer

    options = ServerOptions("127.0.0.1", 0, None)
    retryable = (
        tt.ServerUnavailableError, tt.RequestFailedError, tt.ServerBusyError, tt.ModelNotReadyError
    )  # fmt: skip
    with (
        TritonServer(packaged.repository, options) as one,
        TritonServer(packaged.repository, options) as other,
        balancer(tmp_path, one.grpc_address, other.grpc_address) as (address, trusted),
        connect(address, trusted) as client,
    ):
        one.wait_until_ready(120)
        other.wait_until_ready(120)
        expected = client.generate(prompt_ids=[5], max_new_tokens=200).ids
        answers, killed = [], threading.Event()

        def ask() -> None:
            for _ in range(6):
                try:
                    answers.append(client.generate(prompt_ids=[5], max_new_tokens=200).ids)
                except retryable:
                    answers.append(client.generate(prompt_ids=[5], max_new_tokens=200).ids)
                if len(answers) > 12 and not killed.is_set():
                    killed.set()
                    one.kill()

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert killed.is_set()
        assert answers == [expected] * 48


def serve(repository: Path, port: int) -> subprocess.Popen:
    """Start `twotower serve`, and return it when it is ready."""
    command = [*TWOTOWER, "serve", str(repository), "--grpc-port", str(port), "--no-metrics"]
    running = subprocess.Popen([*command, "--grace", "120"], stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline().startswith("ready")
    return running


@needs_nginx
@pytest.mark.slow
@pytest.mark.server
def test_a_rolling_restart_under_load_loses_nothing(packaged, tmp_path) -> None:
    """Each server in turn drains, ends and comes back; callers who try again all get answers."""
    ports = [free_port(), free_port()]
    servers = [serve(packaged.repository, port) for port in ports]
    restarted, answers = threading.Event(), []

    def prompts() -> Iterator[list[int]]:
        while not restarted.is_set():
            yield [5]

    def ask(client: tt.TwoTowerClient) -> None:
        # nginx does not ask who is ready: half of what is sent again comes to the same server.
        retry = tt.Retry(attempts=40, most_seconds=1)
        options = {"max_new_tokens": 200, "retry": retry, "concurrency": 8}
        answers.extend(client.generate_many(prompts(), **options))

    try:
        with (
            balancer(tmp_path, *(f"127.0.0.1:{port}" for port in ports)) as (address, trusted),
            connect(address, trusted) as client,
        ):
            expected = client.generate(prompt_ids=[5], max_new_tokens=200).ids
            asking = threading.Thread(target=ask, args=[client])
            asking.start()
            for place, port in enumerate(ports):
                servers[place].terminate()
                assert servers[place].wait(120) == 0
                servers[place] = serve(packaged.repository, port)
            restarted.set()
            asking.join(120)
    finally:
        restarted.set()
        for server in servers:
            server.kill()
            server.communicate()
    assert len(answers) > 20
    assert {getattr(answer, "ids", answer) for answer in answers} == {expected}
