"""A real server on engines that answer the golden prompt wrongly does not start, and says why."""

from __future__ import annotations

import json
import shutil

import pytest

from twotower_contract.engine_set import open_engine_set
from twotower_engines.errors import ServingError
from twotower_engines.serving.package import package
from twotower_engines.serving.server import ServerOptions, TritonServer
from twotower_engines.serving.settings import Settings

pytestmark = pytest.mark.server


def rotate_experts(manifest) -> None:
    """The denoiser's experts change places; every digest and shape is right."""
    bank = manifest["weights"]["denoiser"]["denoiser_tower.layers.1.mixer.experts.up_proj"]
    bank["sources"] = bank["sources"][1:] + bank["sources"][:1]


def forget_the_answer(manifest) -> None:
    """Nothing to compare with; the weights are random, so what they say is word salad."""
    names = ("prompt_ids", "mode", "max_new_tokens", "block_size", "steps", "threshold")
    request = {name: manifest["golden"][name] for name in names}
    manifest |= {"golden": None, "golden_missing": {"reason": "lost", "request": request}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(rotate_experts, "golden self-test: ", marks=pytest.mark.slow),
        (forget_the_answer, "golden self-test: .*word salad"),
    ],
)
def test_engines_that_answer_wrongly_are_not_served(packaged, tmp_path, change, message) -> None:
    engines = tmp_path / "engines"
    shutil.copytree(packaged.engines, engines)
    manifest = json.loads((engines / "manifest.json").read_text())
    change(manifest)
    (engines / "manifest.json").write_text(json.dumps(manifest))
    settings = Settings(engines, slots=2, threads=1)
    package(open_engine_set(engines), tmp_path / "repository", settings)
    options = ServerOptions("127.0.0.1", 0, None, None)
    with (
        TritonServer(tmp_path / "repository", options) as server,
        pytest.raises(ServingError, match=message),
    ):
        server.wait_until_ready(60)
