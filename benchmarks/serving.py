"""What serving adds to the engines on this machine, as ratios in one run.

    python -m benchmarks.serving

The trained tiny checkpoint, held-out prompts, greedy, threshold 0.9, on the CPU in float32. The
same requests go to the engine loop alone (no server, no text, one process) and to a real Triton
server through our asynchronous client, by so many streams at once; each stream sends one request
after the other. Both use one thread for the engines; the server, its Python model and the client
share what is left of the machine, so the ratio holds for a machine of this size and is less on a
larger one.

A turn of this checkpoint takes a few milliseconds. A turn of the released model takes ten times as
long on a GPU, for as many blocks, so what serving adds weighs less there.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import machine, today, write_results
from tests.support import TWOTOWER
from twotower_client import AsyncTwoTowerClient
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import Runtime
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.serving.package import package
from twotower_engines.serving.server import ServerOptions, TritonServer
from twotower_engines.serving.settings import Settings
from twotower_export.tiny.corpus import documents

NEW_TOKENS = 256
STREAMS = (1, 16, 32, 128)
REQUESTS = 256  # in all; for one stream a quarter
REPEATS = 3
Answers = list[tuple[int, ...]]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines = build(folder)
        tokenizer = Tokenizer(engines.folder)
        held_out = documents("held_out", seed=0)
        prompts = [tokenizer.encode(next(held_out).prompt) for _ in range(REQUESTS)]
        settings = Settings(engines.folder, threads=1)
        package(engines, folder / "repository", settings)
        runtime = open_runtime(engines, threads=1)
        rows = []
        with TritonServer(
            folder / "repository", ServerOptions("127.0.0.1", 0, None, None)
        ) as server:
            server.wait_until_ready()
            for streams in STREAMS:
                share = prompts if streams > 1 else prompts[: REQUESTS // 4]
                rows.append(compare(runtime, server, share, streams))
                print(rows[-1], flush=True)
        runtime.close()
    write(rows)


def build(folder: Path) -> EngineSet:
    """Export and build the shipped checkpoint with the verbs that a user would call."""
    checkpoint, bundle, engines = (str(folder / n) for n in ("checkpoint", "bundle", "engines"))
    for verb in (
        ["tiny", checkpoint, "--pretrained"],
        ["export", checkpoint, bundle],
        ["build", bundle, "--sku", "cpu", engines, "--slots", "128", "--context", "1024"],
    ):
        subprocess.run([*TWOTOWER, *verb], check=True, capture_output=True)
    return open_engine_set(Path(engines))


def compare(
    runtime: Runtime, server: TritonServer, prompts: Sequence[tuple[int, ...]], streams: int
) -> dict[str, float]:
    """The shortest of some repeats of both ways, taken in turns: noise hits both alike."""
    bare, served = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        expected = engine_answers(runtime, prompts, streams)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        answers = asyncio.run(served_answers(server.grpc_address, prompts, streams))
        served.append(time.perf_counter() - start)
        assert answers == expected, "the server answers as the engines do"
    tokens = sum(map(len, expected))
    return {
        "streams": streams,
        "tokens": tokens,
        "engine_seconds": round(min(bare), 3),
        "served_seconds": round(min(served), 3),
        "ratio": round(min(served) / min(bare), 3),
        "tokens_per_second": round(tokens / min(served)),
    }


def engine_answers(runtime: Runtime, prompts: Sequence[tuple[int, ...]], streams: int) -> Answers:
    """The engine loop alone, with a new request for each that ends."""
    scheduler, waiting = Scheduler(runtime, streams), list(enumerate(prompts))
    answers: dict[str, list[int]] = {}
    while waiting or not scheduler.idle:
        while waiting and scheduler.active + len(scheduler.waiting_ids) < streams:
            number, prompt = waiting.pop(0)
            answers[str(number)] = []
            scheduler.submit(Request(str(number), prompt, max_new_tokens=NEW_TOKENS))
        for event in scheduler.turn():
            answers[event.request_id] += event.ids
    return [tuple(ids) for ids in answers.values()]


async def served_answers(address: str, prompts: Sequence[tuple[int, ...]], streams: int) -> Answers:
    """The server, asked by so many streams at once."""
    answers: dict[int, tuple[int, ...]] = {}
    waiting = list(enumerate(prompts))

    async def stream(client: AsyncTwoTowerClient) -> None:
        while waiting:
            number, prompt = waiting.pop(0)
            answer = await client.generate(prompt_ids=prompt, max_new_tokens=NEW_TOKENS)
            answers[number] = answer.ids

    async with AsyncTwoTowerClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(streams)))
    return [answers[number] for number in range(len(prompts))]


def write(rows: list[dict[str, float]]) -> None:
    """Print the results as a table, and write both forms."""
    where = machine()
    alone = rows[0]["tokens_per_second"]
    lines = [
        "# Serving on the CPU",
        "",
        f"`python -m benchmarks.serving`, {today()}, {where}; trained tiny checkpoint, "
        f"{NEW_TOKENS} tokens per answer, engines on one thread, best of {REPEATS}.",
        "",
        "| streams | engines alone, s | served, s | served / alone | served, tokens/s | to one |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = row["tokens_per_second"] / alone
        lines.append(
            f"| {row['streams']} | {row['engine_seconds']:.2f} | {row['served_seconds']:.2f} | "
            f"{row['ratio']:.2f} | {row['tokens_per_second']} | {times:.2f}x |"
        )
    print("\n".join(lines))
    write_results("serving-cpu", lines, {"machine": where, "rows": rows})


if __name__ == "__main__":
    main()
