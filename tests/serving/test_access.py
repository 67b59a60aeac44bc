"""Closed doors: encryption on both sides, the access key, and what nobody but `serve` may do."""

from __future__ import annotations

import json
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

import twotower_client as tt
from tests.support import TWOTOWER
from tests.support.command import twotower
from twotower_engines.errors import ServingError
from twotower_engines.serving.front import Front
from twotower_engines.serving.launch import ServerOptions, Tls, name_of, read_key, tls_of


def sign(folder: Path, name: str, authority: str | None = None) -> tuple[Path, Path]:
    """Make a certificate and its key, signed by itself or by an authority."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    signer = []
    if authority is not None:
        signer = ["-CA", folder / f"{authority}.pem", "-CAkey", folder / f"{authority}.key"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", f"/CN={name}",
         "-addext", "subjectAltName=DNS:localhost", *signer],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """An authority, and certificates that it signed for the server and a client."""
    folder = tmp_path_factory.mktemp("keys")
    sign(folder, "authority")
    for name in ("server", "client"):
        sign(folder, name, "authority")
    (folder / "access").write_text("open-sesame\n")
    return folder


@pytest.fixture(scope="module")
def closing(files) -> ServerOptions:
    tls = Tls(files / "server.pem", files / "server.key", files / "authority.pem")
    return ServerOptions("127.0.0.1", 0, None, tls=tls, access_key=read_key(files / "access"))


@pytest.fixture(scope="module")
def closed(packaged, closing):
    from twotower_engines.serving.server import TritonServer

    with TritonServer(packaged.repository, closing) as server:
        server.wait_until_ready(120)
        yield server


def options(files: Path, server) -> list[str]:
    return [
        "--url", server.grpc_address.replace("127.0.0.1", "localhost"),
        "--tls-authority", str(files / "authority.pem"),
        "--tls-certificate", str(files / "client.pem"), "--tls-key", str(files / "client.key"),
    ]  # fmt: skip


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_callers_need_a_certificate_and_the_key(closed, files) -> None:
    known, key = options(files, closed), ["--key-file", str(files / "access")]
    ask = ("generate", "--prompt-ids", "5", "--max-new-tokens", "4")
    ran = twotower(*ask, *known, *key)
    assert ran.returncode == 0, ran.stderr
    assert twotower("probe", "ready", *known, *key).returncode == 0
    for code, words in (
        (2, known),
        (1, [*known[:4], *key]),
        (1, ["--url", closed.grpc_address, *key]),
    ):
        refused = twotower(*ask, *words)
        assert refused.returncode == code, refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_the_key_is_named_where_it_is_missing(closed, files) -> None:
    ran = twotower("generate", "--prompt-ids", "5", *options(files, closed))
    assert "access key" in ran.stderr
    assert "--key-file" in ran.stderr


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_openais_interface_is_closed_alike(closed, closing, packaged, files) -> None:
    front = Front("openai", closing, 0, closed.dialled, packaged.engines)
    try:
        url = f"https://{front.address.replace('127.0.0.1', 'localhost')}/v1"
        trusting = ssl.create_default_context(cafile=files / "authority.pem")
        body = json.dumps({"model": "twotower", "prompt": "Mia", "max_tokens": 4}).encode()

        def ask(key: str) -> dict:
            headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
            request = urllib.request.Request(f"{url}/completions", body, headers)
            with urllib.request.urlopen(request, timeout=30, context=trusting) as answer:
                return json.load(answer)

        with pytest.raises(OSError, match=r"(?i)certificate|reset|closed|eof occurred"):
            ask("open-sesame")
        trusting.load_cert_chain(files / "client.pem", files / "client.key")
        assert ask("open-sesame")["usage"]["completion_tokens"] == 4
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask("other")
    finally:
        front.close()


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_serve_itself_gets_in(closed) -> None:
    with closed.asker() as asker:
        assert asker.probe("twotower", 20)["draining"] is False
        closed.reload("postprocessing")
        asker.probe("ensemble", 20)


@pytest.mark.server
@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("RepositoryModelUnload", service_pb2.RepositoryModelUnloadRequest(model_name="twotower")),
        ("RepositoryModelLoad", service_pb2.RepositoryModelLoadRequest(model_name="twotower")),
        ("RepositoryIndex", service_pb2.RepositoryIndexRequest()),
        (
            "SystemSharedMemoryRegister",
            service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8),
        ),
        ("LogSettings", service_pb2.LogSettingsRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_serve_alone_may_do(server, call, request_) -> None:
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError, match="restricted"):
            getattr(stub, call)(request_, timeout=20)


def test_options_that_do_not_fit_are_refused(files) -> None:
    with pytest.raises(ServingError, match="belong together"):
        tls_of(files / "server.pem", None, None)
    with pytest.raises(ServingError, match=r"none\.pem: cannot be read"):
        ServerOptions(tls=Tls(files / "none.pem", files / "server.key")).check()
    with pytest.raises(ServingError, match="is no certificate"):
        name_of(files / "server.key")
    for key in ("", "two words", "é", "a\nb"):
        with pytest.raises(ServingError, match="access key"):
            ServerOptions(access_key=key).check()
    for url in ("localhost:4318", "http://", "notaurl", "http://a b/"):
        with pytest.raises(ServingError, match="is no address of a collector"):
            ServerOptions(traces=url).check()
    ServerOptions(traces="https://collector.example:4318/v1/traces").check()
    ran = twotower("generate", "hi", "--tls-key", str(files / "client.key"))
    assert (ran.returncode, "belong together" in ran.stderr) == (2, True)
    ran = twotower("probe", "live", "--metadata", "x-api-key")
    assert (ran.returncode, "give NAME=VALUE" in ran.stderr) == (2, True)
    ran = twotower("probe", "live", "--key-file", str(files / "none"))
    assert (ran.returncode, "cannot be read" in ran.stderr) == (2, True)


@pytest.mark.slow  # a server of its own
@pytest.mark.server
def test_a_client_takes_the_same_settings(closed, files) -> None:
    credentials = grpc.ssl_channel_credentials(
        *((files / name).read_bytes() for name in ("authority.pem", "client.key", "client.pem"))
    )
    with tt.TwoTowerClient(
        closed.grpc_address, credentials=credentials, server_name="localhost",
        access_key="open-sesame",
    ) as client:  # fmt: skip
        client.check_ready()
        assert len(client.generate(prompt_ids=[5], max_new_tokens=4).ids) == 4


@pytest.mark.slow  # a server of its own
def test_a_load_test_gets_in_the_same_way(closed, files) -> None:
    words = ["bench", *options(files, closed), "--key-file", files / "access"]
    ran = twotower(*words, "--num-prompts", 2, "--warmup", 0, "--max-new-tokens", 4)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[1].split()[:5] == ["1", "at", "a", "time", "2"]


@pytest.mark.slow  # a server of its own
def test_the_openai_front_end_gets_in_the_same_way(closed, files) -> None:
    command = [*TWOTOWER, "openai", *options(files, closed), "--port", "0"]
    command += ["--key-file", str(files / "access")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        address = process.stdout.readline().strip().removeprefix("ready http=")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://{address}/health", timeout=30) as answer:
            assert answer.status == 200
        process.terminate()
