"""Tools that know OpenAI's interface, before the trained checkpoint: lm-eval and AIPerf."""

from __future__ import annotations

import itertools
import json
import os
import subprocess

import pytest

from tests.client.test_openai import front_end
from tests.support.environments import environment

pytestmark = [pytest.mark.server, pytest.mark.slow]
STORIES = 16
TASK = """
task: held_out_stories
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_gen_toks: {tokens}, temperature: 0, until: ["<none>"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
TOKENS = 32


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A server on the trained checkpoint, and the front end before it."""
    from twotower_client.cli import cli
    from twotower_engines.serving.server import ServerOptions, TritonServer

    folder = tmp_path_factory.mktemp("trained")
    places = [str(folder / name) for name in ("checkpoint", "bundle", "engines", "repository")]
    checkpoint, bundle, engines, repository = places
    cli.main(["tiny", checkpoint, "--pretrained"], standalone_mode=False)
    cli.main(["export", checkpoint, bundle], standalone_mode=False)
    cli.main(["build", bundle, engines, "--sku", "cpu"], standalone_mode=False)
    cli.main(["package", engines, repository], standalone_mode=False)
    with TritonServer(folder / "repository", ServerOptions("127.0.0.1", 0, None, None)) as server:
        server.wait_until_ready(60)
        with front_end(server) as address:
            yield server, address, folder / "checkpoint"


def run(command, **variables) -> str:
    environment = {**os.environ, "NO_PROXY": "*", **variables}
    ran = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


def test_lm_eval_finds_what_the_client_finds(trained, tmp_path) -> None:
    """The share of held-out stories that go on exactly as they should."""
    from twotower_client import TwoTowerClient
    from twotower_export.tiny.corpus import documents

    server, address, _ = trained
    stories = list(itertools.islice(documents("held_out", seed=0), STORIES))
    with TwoTowerClient(server.grpc_address) as client:
        answers = [client.generate(one.prompt, max_new_tokens=TOKENS).text for one in stories]
    # Every other story is given an answer that no model would find.
    wanted = [text if number % 2 else "wrong" for number, text in enumerate(answers)]
    data = tmp_path / "stories.jsonl"
    pairs = zip(stories, wanted, strict=True)
    data.write_text("".join(json.dumps({"prompt": s.prompt, "answer": a}) + "\n" for s, a in pairs))
    (tmp_path / "held_out_stories.yaml").write_text(TASK.format(data=data, tokens=TOKENS))
    url = f"base_url={address}/v1/completions,model=twotower,num_concurrent=4,max_retries=1"
    model = f"{url},tokenized_requests=False,tokenizer_backend=None"
    tool = environment("lm-eval[api]==0.4.13") / "lm_eval"
    command = [tool, "run", "--model", "local-completions", "--model_args", model, "--tasks"]
    command += ["held_out_stories", "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    run(command, OPENAI_API_KEY="x", HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    [result] = (tmp_path / "out").rglob("results*.json")
    scores = json.loads(result.read_text())["results"]["held_out_stories"]
    assert scores["exact_match,none"] == 0.5


def test_aiperf_measures_the_front_end(trained, tmp_path) -> None:
    _, address, checkpoint = trained
    tool = environment("aiperf==0.13.0") / "aiperf"
    command = [tool, "profile", "--model", "twotower", "--url", address, "--endpoint-type"]
    command += ["completions", "--streaming", "--concurrency", "4", "--request-count", "12"]
    command += ["--output-artifact-dir", tmp_path / "out", "--tokenizer", checkpoint]
    command += ["--isl", "32", "--osl", "32", "--ui", "none"]
    command += ["--extra-inputs", "ignore_eos:true"]
    run(command)
    [result] = (tmp_path / "out").rglob("profile_export_aiperf.json")
    figures = json.loads(result.read_text())
    assert figures["request_count"]["avg"] == 12
    assert figures["time_to_first_token"]["avg"] > 0
