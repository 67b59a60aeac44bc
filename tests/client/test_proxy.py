"""A proxy in the environment: never between this machine and itself, and named elsewhere."""

from __future__ import annotations

import asyncio
import http.server
import threading

import pytest

import twotower_client as tt
from twotower_client.connection import PROXY_VARIABLES, channel_options, proxy_of


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that refuses everything, named by every variable; yields what it was asked for."""
    asked = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name in PROXY_VARIABLES:
            monkeypatch.setenv(name, f"http://user:secret@127.0.0.1:{server.server_port}")
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield asked
        server.shutdown()


def test_this_machine_is_asked_directly(proxy) -> None:
    with tt.TwoTowerClient("localhost:9") as client:
        with pytest.raises(tt.ServerUnavailableError) as refused:
            client.check_ready()
        assert "proxy" not in str(refused.value)

    async def ask() -> None:
        async with tt.AsyncTwoTowerClient("127.0.0.1:9") as client:
            with pytest.raises(tt.ServerUnavailableError):
                await client.check_ready()

    asyncio.run(ask())
    assert proxy == []


def test_elsewhere_the_error_names_the_proxy_without_its_password(proxy) -> None:
    with (
        tt.TwoTowerClient("192.0.2.1:8001") as client,
        pytest.raises(tt.ServerUnavailableError) as refused,
    ):
        client.check_ready()
    assert proxy[0] == "192.0.2.1:8001"
    assert "through the proxy grpc_proxy=http://127.0.0.1:" in str(refused.value)
    assert "add 192.0.2.1 to no_proxy" in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "is_asked"),
    [
        ("localhost:8001", False),
        ("LOCALHOST:8001", False),
        ("a.localhost:8001", False),
        ("127.8.9.1:8001", False),
        ("[::1]:8001", False),
        ("10.0.0.1:8001", True),
        ("notlocalhost:8001", True),
        ("[fe80::1]:8001", True),
    ],
)
def test_which_addresses_are_this_machine(proxy, url: str, is_asked: bool) -> None:
    assert dict(channel_options(url))["grpc.enable_http_proxy"] == is_asked
    assert (proxy_of(url) is not None) == is_asked


def test_a_host_of_no_proxy_is_not_said_to_be_proxied(proxy, monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "triton.example,10.0.0.1")
    assert proxy_of("10.0.0.1:8001") is None
    assert proxy_of("a.triton.example:8001") is None
    assert proxy_of("10.0.0.2:8001") is not None
