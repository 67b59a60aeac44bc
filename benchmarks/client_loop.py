"""The loop that a server of answers spares its users, in two forms.

The client decides what comes next, and asks a Triton model over gRPC for each call of a tower; a
call of the denoiser refines the block too, so that ids come back and not logits. One loop waits for
each call before the next; several run beside each other, each for a request of its own. The model
is `step_model`, in a process of Triton's Python backend.

- *States in the model.* The model keeps each context in a slot, and a call names it. It is written
  for this; Triton's own backends have nothing like it. Their sequence batcher keeps states for the
  model that made them alone ("implicit state"), and here one tower makes what the other reads.
- *States travel.* A call of the denoiser brings the context's states, and one of the context tower
  returns the new ones: so it goes with the exported graphs in a stock backend. All states are one
  tensor here, with room for the next 64 tokens at most, which costs less than a tensor for each.
  Calls are not batched: a batcher would need states of one size.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.step_model import BEGIN, CONFIG, DENOISE, ENGINES, EXTEND, TRAVELS
from twotower_contract.config import ModelConfig
from twotower_contract.engine_set import EngineSet
from twotower_engines.generation.request import Request
from twotower_engines.generation.sampling import row_seed
from twotower_engines.serving.server import ServerOptions, TritonServer

NEW_TOKENS = 256  # of an answer, at most
OPTIONS = ServerOptions("127.0.0.1", 0, None, None)
Prompts = Sequence[tuple[int, ...]]
Answers = list[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests, all greedy.

    Attributes:
        name: In a word or two.
        ignore_eos: Whether all answers have `NEW_TOKENS` tokens.
        requests: In all, by streams that ask at once.
        looped: In all, by loops in the client.
    """

    name: str
    ignore_eos: bool
    requests: Mapping[int, int]
    looped: Mapping[int, int]


def run_loops(
    engines: EngineSet,
    repository: Path,
    prompts: Prompts,
    expected: Mapping[Workload, Answers],
    repeats: int,
) -> dict[Workload, list[dict[str, Any]]]:
    """Answer by loops in the client; return the best of some repeats of each form.

    Args:
        engines: The engine set.
        repository: Of a model `steps` without its configuration.
        prompts: As many as the largest number of requests.
        expected: The first answers of each workload.
        repeats: Number of repeats.
    """
    (repository / "steps" / "config.pbtxt").write_text(CONFIG)
    os.environ[ENGINES] = str(engines.folder)
    rows: dict[Workload, list[dict[str, Any]]] = {workload: [] for workload in expected}
    with TritonServer(repository, OPTIONS, ("steps",)) as server:
        server.wait_until_ready()
        for workload, travels in itertools.product(expected, (False, True)):
            for loops, count in workload.looped.items():
                speeds = []
                for _ in range(repeats):
                    start, asked = time.perf_counter(), prompts[:count]
                    loop = ClientLoop(engines.manifest.model, travels, workload.ignore_eos)
                    answers = asyncio.run(loop.answers(server.grpc_address, asked, loops))
                    same = list(zip(expected[workload], answers, strict=False))
                    assert all(one == other for one, other in same), "the loop answers alike"
                    speeds.append(sum(map(len, answers)) / (time.perf_counter() - start))
                row = {"loops": loops, "travels": travels, "tokens per second": max(speeds)}
                rows[workload].append(row)
    return rows


class ClientLoop:
    """Answers requests by single calls of the towers.

    Args:
        model: The model's configuration.
        travels: Whether the states of a context travel; else the model keeps them.
        ignore_eos: Whether an answer goes on after the token that ends it.
    """

    def __init__(self, model: ModelConfig, travels: bool, ignore_eos: bool) -> None:
        from tritonclient.grpc import InferInput

        self._model, self._travels, self._tensor = model, travels, InferInput
        self._ends = () if ignore_eos else model.eos_token_ids

    async def answers(self, address: str, prompts: Prompts, loops: int) -> Answers:
        """Answer prompts of ids by so many loops at once."""
        from tritonclient.grpc.aio import InferenceServerClient

        made: dict[int, tuple[int, ...]] = {}
        waiting = list(enumerate(prompts))

        async def loop(client: Any, number: int) -> None:
            while waiting:
                place, prompt = waiting.pop(0)
                slot = TRAVELS if self._travels else number
                made[place] = await self._answer(client, slot, prompt)

        async with InferenceServerClient(address) as client:
            await asyncio.gather(*(loop(client, number) for number in range(loops)))
        return [made[number] for number in range(len(prompts))]

    async def _answer(self, client: Any, slot: int, prompt: tuple[int, ...]) -> tuple[int, ...]:
        request = Request("", prompt, max_new_tokens=NEW_TOKENS)
        ids: list[int] = []
        result = await self._call(client, None, BEGIN, slot, 0, 0, 0, *prompt)
        states, length = result.as_numpy("states"), len(prompt)
        while True:
            block = [self._model.mask_token_id] * request.block_size
            for step in range(request.steps):
                left, seed = request.steps - step, row_seed(request.seed, length, step)
                result = await self._call(client, states, DENOISE, slot, length, left, seed, *block)
                block = result.as_numpy("ids").tolist()
                if self._model.mask_token_id not in block:
                    break
            for token in block:
                ids.append(token)
                if token in self._ends or len(ids) == request.max_new_tokens:
                    return tuple(ids)
            result = await self._call(client, states, EXTEND, slot, length, 0, 0, *block)
            states, length = result.as_numpy("states"), length + len(block)

    async def _call(self, client: Any, states: Any, *numbers: int) -> Any:
        arrays = {"call": np.array(numbers, np.int32)}
        if states is not None:
            arrays["states"] = states
        tensors = []
        for name, array in arrays.items():
            tensor = self._tensor(name, array.shape, "FP32" if name == "states" else "INT32")
            tensor.set_data_from_numpy(array)
            tensors.append(tensor)
        return await client.infer("steps", tensors)
