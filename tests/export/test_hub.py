"""Hub ids, through the real client and a stand-in hub (see `hub_server`)."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support import TWOTOWER
from tests.support.checkpoint_files import random_tensors, write_checkpoint
from tests.support.hub_server import HubServer
from twotower_contract.manifest import read_manifest
from twotower_export import hub
from twotower_export.hub import HubError
from twotower_export.tiny.checkpoints import tiny_config

ID = "somebody/TwoTower-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = tiny_config("ME*", hidden=16)


@pytest.fixture
def server(tmp_path):
    folder = write_checkpoint(tmp_path / "remote", CONFIG, random_tensors(CONFIG))
    (folder / "modeling.py").write_text("raise SystemExit('remote code')")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"the same weights in another format")
    with HubServer(ID, COMMIT, folder) as running:
        yield running


@pytest.fixture
def twotower(tmp_path, server):
    """Runs a verb against the stand-in, with a cache of its own."""

    def call(*arguments, offline=False):
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        environment.pop("HF_HUB_CACHE", None)
        command = [*TWOTOWER, *map(str, arguments)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )

    return call


def test_a_pinned_checkpoint_is_fetched_once_and_then_needs_no_hub(tmp_path, server, twotower):
    done = twotower("export", ID, "bundle", "--revision", COMMIT, "--json")
    assert done.returncode == 0, done.stderr
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "has no tokenizer.json, so prompts and answers will be token ids" in warning
    source = read_manifest(tmp_path / "bundle").checkpoint
    assert (source.id, source.revision) == (ID, COMMIT)
    assert source.path.match(f"snapshots/{COMMIT}")
    assert not server.requests["GET", "modeling.py"], "remote code is never fetched"
    assert not server.requests["GET", "original/model.safetensors"], "only the top folder is"
    fetched = sum(count for (method, _), count in server.requests.items() if method == "GET")
    again = twotower("inspect", f"{ID}@{COMMIT}")
    assert again.returncode == 0, again.stderr
    assert fetched == sum(n for (method, _), n in server.requests.items() if method == "GET")
    offline = twotower("inspect", f"{ID}@{COMMIT}", "--json", offline=True)
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["revision"] == COMMIT


def test_unpinned_checkpoint_is_warned_about_and_recorded(tmp_path, twotower):
    done = twotower("export", ID, "bundle", "--json")
    assert done.returncode == 0, done.stderr
    assert f"warning: {ID}: no revision was named; took {COMMIT}" in done.stderr
    assert f"{ID}@{COMMIT}" in json.loads(done.stdout)["warnings"][0]
    assert read_manifest(tmp_path / "bundle").checkpoint.revision == COMMIT


@pytest.mark.slow
def test_interrupted_download_goes_on_with_what_is_missing(tmp_path, server, twotower):
    shard = "model-00002-of-00003.safetensors"
    server.broken.add(shard)
    failed = twotower("export", f"{ID}@{COMMIT}", "bundle")
    assert failed.returncode == 2
    assert "error: " in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "bundle").exists()
    server.broken.clear()
    kept = {name for method, name in server.requests if method == "GET" and name != shard}
    before = server.requests.copy()
    done = twotower("export", f"{ID}@{COMMIT}", "bundle")
    assert done.returncode == 0, done.stderr
    again = {name for name in kept if server.requests["GET", name] > before["GET", name]}
    assert "model-00001-of-00003.safetensors" in kept
    assert not again, f"{again} were fetched twice"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "neither such a folder nor such a repository on the hub"),
        (f"{ID}@{'b' * 7}", "the hub has no revision 'bbbbbbb'"),
    ],
)
def test_unknown_names_are_refused(twotower, name, message):
    done = twotower("export", name, "bundle")
    assert done.returncode == 2
    assert message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "nor such a repository on the hub (status 401), or it is private"),
        (
            401,
            {"X-Error-Message": "Invalid credentials in Authorization header"},
            "the hub does not accept your token (status 401)",
        ),
        (403, {}, "the hub does not accept your token (status 403)"),
        (401, {"X-Error-Code": "GatedRepo"}, "its owner asks you to accept terms first"),
        (404, {"X-Error-Code": "RepoNotFound"}, "nor such a repository on the hub (status 404)"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "the hub has no main branch of it"),
        (429, {"Retry-After": "1"}, "too many requests from here (status 429): try again in 1 sec"),
        (500, {}, "the hub has a fault of its own (status 500)"),
        (503, {}, "the hub has a fault of its own (status 503)"),
    ],
)
def test_what_the_hub_refuses_has_a_message_of_its_own(monkeypatch, status, headers, message):
    """The errors are those that the real client makes of such answers."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status

    request = httpx2.Request("GET", f"https://hub.test/api/models/{ID}/revision/main")
    response = httpx2.Response(status, headers=headers, request=request)

    def download(*_, **__):
        hf_raise_for_status(response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(HubError) as caught:
        hub.fetch(ID, None)
    assert message in str(caught.value)


def test_a_refusal_of_the_hub_is_the_commands(server, twotower):
    """Not every one: the client itself asks again after 429 and 5xx, for minutes."""
    server.refusal = 403, {}
    done = twotower("export", ID, "bundle")
    assert done.returncode == 2
    assert f"error: {ID}: the hub does not accept your token (status 403)" in done.stderr


def test_the_oldest_client_lacks_an_error_of_the_newest(monkeypatch):
    from huggingface_hub import errors

    # version 1.0.0 has no such name
    monkeypatch.delattr(errors, "IncompleteSnapshotError", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match=r"the local cache does not hold it"):
        hub.fetch("somebody/nothing", None, local_only=True)


def test_inspect_downloads_nothing(server, twotower):
    done = twotower("inspect", f"{ID}@{COMMIT}")
    assert done.returncode == 2
    assert "`twotower export` downloads it" in done.stderr
    assert not server.requests


def test_two_revisions_at_once_are_refused(twotower):
    done = twotower("export", f"{ID}@{COMMIT}", "bundle", "--revision", "main")
    assert done.returncode == 2
    assert "give one" in done.stderr


def test_what_is_a_hub_id():
    assert hub.is_id("nvidia/Nemotron-Labs-TwoTower-30B-A3B-Base-BF16")
    for name in ("checkpoint", "./a/b", "/a/b", "a/b/c", "../a", "a/"):
        assert not hub.is_id(name), name


def test_cached_identity(tmp_path):
    folder = tmp_path / "models--somebody--TwoTower--tiny" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    assert hub.cached_identity(folder) == ("somebody/TwoTower--tiny", COMMIT)
    assert hub.cached_identity(tmp_path) == (None, None)
