"""The loop that a server of answers spares its users, in two forms.

The client decides what comes next, and asks Triton over gRPC for each call of a tower; a call of
the denoiser refines the block too, so that ids come back and not logits. One loop waits for each
call before the next; several run beside each other, each for a request of its own.

- *States travel.* Two models serve the towers' graphs as they are (`tower_model`), which a stock
  backend would do: the states that the context tower returns are inputs of the next call of either
  tower. Triton's own states ("implicit state" of a sequence) belong to the model that made them,
  and here one tower makes what the other reads. Calls are not batched: a batcher would need caches
  of one size. The client keeps room for at most 64 tokens behind a context.
- *States in the model.* One model, written for this (`step_model`), keeps each context in a slot,
  and a call names it. No stock backend has anything like it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks import step_model, tower_model
from benchmarks.step_model import BEGIN, DENOISE, ENGINES, EXTEND
from twotower_contract.config import ModelConfig
from twotower_contract.engine_set import EngineSet
from twotower_engines.generation.request import Request
from twotower_engines.generation.sampling import row_seed
from twotower_engines.runtime.host_states import StateShapes
from twotower_engines.runtime.mamba_recurrence import whole_chunks
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.serving.server import ServerOptions, TritonServer

NEW_TOKENS = 256  # of an answer, at most
ROOM = 64  # tokens behind a context
OPTIONS = ServerOptions("127.0.0.1", 0, None, None)
Prompts = Sequence[tuple[int, ...]]
Answers = list[tuple[int, ...]]
Array = npt.NDArray[Any]


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
    runtime: OnnxRuntime,
    repository: Path,
    prompts: Prompts,
    expected: Mapping[Workload, Answers],
    repeats: int,
) -> dict[Workload, list[dict[str, Any]]]:
    """Answer by loops in the client; return the best of some repeats of each form.

    Args:
        engines: The engine set.
        runtime: Its engines.
        repository: Of models `steps`, `context` and `denoiser` without their configurations.
        prompts: As many as the largest number of requests.
        expected: The first answers of each workload.
        repeats: Number of repeats.
    """
    models = {"steps": step_model.CONFIG}
    models |= {tower: tower_model.configuration(runtime, tower) for tower in tower_model.CALLS}
    for name, text in models.items():
        (repository / name / "config.pbtxt").write_text(text)
    os.environ[ENGINES] = str(engines.folder)
    rows: dict[Workload, list[dict[str, Any]]] = {workload: [] for workload in expected}
    forms: tuple[type[Context], ...] = (ContextThatTravels, ContextInModel)
    with TritonServer(repository, OPTIONS, tuple(models)) as server:
        server.wait_until_ready()
        for workload, form in itertools.product(expected, forms):
            for loops, count in workload.looped.items():
                speeds = []
                for _ in range(repeats):
                    start, asked = time.perf_counter(), prompts[:count]
                    loop = ClientLoop(engines.manifest.model, form, workload.ignore_eos)
                    answers = asyncio.run(loop.answers(server.grpc_address, asked, loops))
                    same = list(zip(expected[workload], answers, strict=False))
                    assert all(one == other for one, other in same), "the loop answers alike"
                    speeds.append(sum(map(len, answers)) / (time.perf_counter() - start))
                row = {"loops": loops, "states": form.states, "tokens per second": max(speeds)}
                rows[workload].append(row)
    return rows


class ContextInModel:
    """The context of a request, empty at first, whose states a model keeps in a slot.

    Args:
        client: An asynchronous client of Triton's.
        loop: Number of the loop that asks.
    """

    states: ClassVar = "in the model"

    def __init__(self, client: Any, _: ModelConfig, loop: int) -> None:
        self._client, self._slot, self._extend = client, loop, BEGIN

    async def extend(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        await self._call(self._extend, self._slot, 0, 0, *ids)
        self._extend = EXTEND

    async def denoise(self, block: Sequence[int], steps_left: int, seed: int) -> list[int]:
        """Return the block after one more step."""
        return await self._call(DENOISE, self._slot, steps_left, seed, *block)

    async def _call(self, *numbers: int) -> list[int]:
        call = {"call": np.array(numbers, np.int32)}
        ids: list[int] = (await infer(self._client, "steps", call, ["ids"]))["ids"].tolist()
        return ids


class ContextThatTravels:
    """The context of a request, empty at first, whose states each call brings.

    Args:
        client: An asynchronous client of Triton's.
        model: The model's configuration.
    """

    states: ClassVar = "travel"

    def __init__(self, client: Any, model: ModelConfig, _: int) -> None:
        self._client, self._length = client, 0
        shapes = StateShapes.of(model)
        self._arrays, self._caches = shapes.named(shapes.empty(1, 0)), shapes.caches

    async def extend(self, ids: Sequence[int]) -> None:
        """Append tokens."""
        names = {f"{name}_new": name for name in self._arrays}
        padded = np.zeros(whole_chunks(len(ids)), np.int32)
        padded[: len(ids)] = ids
        outputs = await self._call("context", padded, len(ids), list(names))
        self._arrays = {names[name]: array for name, array in outputs.items()}
        self._length += len(ids)

    async def denoise(self, block: Sequence[int], steps_left: int, seed: int) -> list[int]:
        """Return the block after one more step."""
        numbers = {
            "conditioned": np.ones(1, np.int32),
            "threshold": np.array([0.9], np.float32),
            "steps_left": np.array([steps_left], np.int32),
            "temperature": np.zeros(1, np.float32),
            "policy": np.zeros(1, np.int32),
            "seed": np.array([seed], np.int32),
        }
        ids = np.array(block, np.int32)
        outputs = await self._call("denoiser", ids, len(block), ["new_ids"], numbers)
        new: list[int] = outputs["new_ids"][0].tolist()
        return new

    async def _call(
        self,
        tower: str,
        ids: npt.NDArray[np.int32],
        length: int,
        outputs: Sequence[str],
        numbers: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Call a tower with `length` tokens of `ids`; return those outputs."""
        self._make_room(ids.size)
        inputs = {
            "ids": ids[None],
            "lengths": np.array([length], np.int32),
            "context_lengths": np.array([self._length], np.int32),
            "logits_wanted": np.zeros(1, np.bool_),
            **(numbers or {}),
            **self._arrays,
        }
        return await infer(self._client, tower, inputs, outputs)

    def _make_room(self, tokens: int) -> None:
        """Let the caches hold so many tokens behind the context."""
        capacity = -(-(self._length + tokens) // ROOM) * ROOM
        for name in self._caches:
            cache = self._arrays[name]
            if cache.shape[2] < capacity:
                more = ((0, 0), (0, 0), (0, capacity - cache.shape[2]), (0, 0))
                self._arrays[name] = np.pad(cache, more)


async def infer(
    client: Any, model: str, inputs: Mapping[str, Array], outputs: Sequence[str]
) -> dict[str, Array]:
    """Ask a model of Triton's, as its documentation shows."""
    from tritonclient.grpc import InferInput, InferRequestedOutput
    from tritonclient.utils import np_to_triton_dtype

    tensors = []
    for name, array in inputs.items():
        tensor = InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    asked = [InferRequestedOutput(name) for name in outputs]
    result = await client.infer(model, tensors, outputs=asked)
    return {name: result.as_numpy(name) for name in outputs}


Context = ContextInModel | ContextThatTravels


class ClientLoop:
    """Answers requests by single calls of the towers.

    Args:
        model: The model's configuration.
        context: Where states are.
        ignore_eos: Whether an answer goes on after the token that ends it.
    """

    def __init__(self, model: ModelConfig, context: type[Context], ignore_eos: bool) -> None:
        self._model, self._context = model, context
        self._ends = () if ignore_eos else model.eos_token_ids

    async def answers(self, address: str, prompts: Prompts, loops: int) -> Answers:
        """Answer prompts of ids by so many loops at once."""
        from tritonclient.grpc.aio import InferenceServerClient

        made: dict[int, tuple[int, ...]] = {}
        waiting = list(enumerate(prompts))

        async def loop(client: Any, number: int) -> None:
            while waiting:
                place, prompt = waiting.pop(0)
                context = self._context(client, self._model, number)
                made[place] = await self._answer(context, prompt)

        async with InferenceServerClient(address) as client:
            await asyncio.gather(*(loop(client, number) for number in range(loops)))
        return [made[number] for number in range(len(prompts))]

    async def _answer(self, context: Context, prompt: tuple[int, ...]) -> tuple[int, ...]:
        request = Request("", prompt, max_new_tokens=NEW_TOKENS)
        ids: list[int] = []
        await context.extend(prompt)
        while True:
            block, start = [self._model.mask_token_id] * request.block_size, len(prompt) + len(ids)
            for step in range(request.steps):
                seed = row_seed(request.seed, start, step)
                block = await context.denoise(block, request.steps - step, seed)
                if self._model.mask_token_id not in block:
                    break
            for token in block:
                ids.append(token)
                if token in self._ends or len(ids) == request.max_new_tokens:
                    return tuple(ids)
            await context.extend(block)
