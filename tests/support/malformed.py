"""Requests over gRPC that are wrong in some way, at every level of the protocol."""

from __future__ import annotations

import random

from tritonclient.grpc import service_pb2

from twotower_client.request import Message
from twotower_contract.options import INPUTS


def malformed_message(draw: random.Random) -> service_pb2.ModelInferRequest:
    """A request that is wrong in some way, at every level of the protocol."""
    message = Message()
    names = draw.sample(list(INPUTS), draw.randint(0, 4))
    for name in names:
        wire, _ = INPUTS[name]
        wire = draw.choice([wire, wire, "INT32", "FP32", "BYTES"])
        count = draw.choice([0, 1, 1, 2, 2**31 - 1, -1])
        size = draw.choice([0, 1, 3, 4, 8, 400])
        message.add_tensor(name, wire, count, draw.randbytes(size))
    request = message.message
    change = draw.randrange(6)
    if change == 0:
        request.inputs.add(name=draw.choice(["", "colour", "text_input"]), datatype="BYTES")
    elif change == 1:
        request.model_name = draw.choice(["", "other", "ensemble", "preprocessing"])
    elif change == 2:
        request.model_version = draw.choice(["0", "7", "x"])
    elif change == 3:
        request.outputs.add(name=draw.choice(["", "colour", "text_output"]))
    elif change == 4:
        request.parameters[draw.choice(["colour", "max_tokens"])].int64_param = draw.getrandbits(62)
    else:
        del request.raw_input_contents[len(request.raw_input_contents) // 2 :]
    return request


def is_refused(
    request: service_pb2.ModelInferRequest, parts: list[service_pb2.ModelStreamInferResponse]
) -> bool:
    """Whether an answer is an error or says so itself; a probe alone may be right by chance."""
    if [one.name for one in request.inputs] == ["probe"]:
        return bool(parts)
    return any(part.error_message or _says_so(part) for part in parts)


def _says_so(part: service_pb2.ModelStreamInferResponse) -> bool:
    content = part.SerializeToString()
    return b"refused" in content or b"cancelled" in content
