"""Answers that are followed by a given text: its tokens are fixed at the end of the canvas."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace

import grpc
from tritonclient.grpc import InferResult, service_pb2_grpc

from twotower_client.aio import AsyncTwoTowerClient
from twotower_client.connection import LOOK_SECONDS
from twotower_client.openai.fields import Wish
from twotower_client.openai.problems import error_of
from twotower_client.response import error_of_rpc
from twotower_client.result import Block
from twotower_contract.options import FREE

TOKENIZER = "preprocessing"  # the model of the repository that gives the ids of a text


async def with_suffix(client: AsyncTwoTowerClient, wish: Wish) -> Wish:
    """Return a wish whose suffix is a canvas; as it is where it has none.

    Raises:
        ApiError: The suffix has no ids, or the server cannot be asked for them.
    """
    if wish.suffix is None:
        return wish
    room = wish.options["max_new_tokens"]
    ids = await _ids_of(client, wish.suffix)
    options = {
        **wish.options,
        "canvas": [FREE] * room + ids,
        "max_new_tokens": room + len(ids),
        "ignore_eos": True,  # an end token would leave the suffix out
        "logprobs": True,  # tells the text of each token, and so where the suffix begins
    }
    return replace(wish, options=options)


async def _ids_of(client: AsyncTwoTowerClient, text: str) -> list[int]:
    """Return the token ids of a text, which the server tells."""
    connection = client._connect(asyncio.get_running_loop())
    message, _ = client._request(text, None, None, {})
    message.model_name = TOKENIZER
    ask = service_pb2_grpc.GRPCInferenceServiceStub(connection.channel).ModelInfer
    try:
        response = await ask(message, timeout=LOOK_SECONDS)
    except grpc.RpcError as problem:
        raise error_of(error_of_rpc(problem, client.url, started=False)) from None
    ids: list[int] = json.loads(InferResult(response).as_numpy("request")[0])["prompt_ids"]
    return ids


@dataclass(slots=True)
class Cutter:
    """Cuts the tokens of the suffix off the blocks of an answer.

    Attributes:
        room: Tokens that are still to come before the suffix; None where there is none.
    """

    room: int | None

    def cut(self, block: Block) -> Block:
        """Return a block without what belongs to the suffix."""
        if self.room is None:
            return block
        ids, details = block.ids[: self.room], block.details[: self.room]
        self.room -= len(ids)
        text = "".join(one.text for one in details)
        return replace(block, ids=ids, text=text, details=details)
