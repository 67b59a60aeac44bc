"""One table of options: command lines, client, engines and server agree on what it declares."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import fields

import numpy as np
import pytest

import twotower_client as tt
from twotower_client.generate_cli import generate
from twotower_client.request import infer_request
from twotower_contract.engine_set import open_engine_set
from twotower_contract.options import INPUTS, OPTIONS, Option, Options, RequestOptions
from twotower_engines.cli.run import run
from twotower_engines.errors import RequestError
from twotower_engines.generation.request import Request
from twotower_engines.serving.preprocessing import Preprocessor

SEED = 3
DRAWS = 6000
DTYPES = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
# a server's own, unknown to the client
OWN_LIMITS = ("these engines", "outside the vocabulary", "the model's end token", "mask token")


def drawn(draw: random.Random, option: Option) -> object:
    """A value that may be right, out of range, on either side of a bound, or of a wrong type."""
    if option.wire == "BOOL":
        return draw.choice([True, False, np.bool_(True), 1, 0, "true"])
    if option.is_list and option.wire == "BYTES":
        texts = [[], ["a"], ("\u00e9", "b" * 256), [""], ["b" * 257], ["a"] * 17, ["\ud800"], [5]]
        return draw.choice([*texts, ["."], ["a", "b"], "abc", 5, b"a"])
    if option.is_list:
        ids = [[], [2, 3], (4,), [-1], [2**31], [1.5], [True], [[1]], [5] * 256, [5] * 257]
        return draw.choice([*ids, 5, "567", b"5"])
    if option.wire == "BYTES" and not option.choices:
        return draw.choice(["", "me", "\u00e9" * 128, "\u00e9" * 129, "\ud800", 5, b"me", ["me"]])
    if option.wire == "BYTES":
        return draw.choice([*option.choices, *option.choices, "hope", "", "\u00e9", 5, b"ar", True])
    low, high = option.low, option.high
    wrong = ["1", True, [1], 1j, math.nan]
    if option.wire == "FP32":
        inside = [low, high, draw.uniform(low, 1), np.float32(0.7), 1, 3.5, 0]
        beyond = [-0.1, high * 1.1, 1e-7, 1e-50, 1.0000000001, math.inf, 1e300, 10**400]
    else:
        inside = [low, high, draw.randint(low, 100), np.int64(low), 0]
        beyond = [low - 1, high + 1, -(2**40), 2**70, 1.0]
    return draw.choice(draw.choice([inside, inside, beyond, wrong]))


def tensors_of(message) -> dict:
    """What the server is handed of a client's message."""
    found = {}
    for tensor, content in zip(message.inputs, message.raw_input_contents, strict=True):
        wire, length = INPUTS[tensor.name]
        assert tensor.datatype == wire
        if wire == "BYTES":
            texts = []
            while content:
                (size,) = struct.unpack("<I", content[:4])
                texts.append(content[4:][:size])
                assert size == len(texts[-1])
                content = content[4 + size :]
            found[tensor.name] = np.array(texts, object)
        else:
            found[tensor.name] = np.frombuffer(content, DTYPES[wire])
        assert list(tensor.shape) == [found[tensor.name].size]
        assert length in (-1, found[tensor.name].size)
    return found


def refused(call) -> str | None:
    try:
        call()
    except (tt.RequestRefusedError, RequestError) as problem:
        return str(problem)
    return None


def test_client_engines_and_server_take_the_same(packaged) -> None:
    preprocessor = Preprocessor(open_engine_set(packaged.engines))
    draw, accepted, reached = random.Random(SEED), dict.fromkeys(OPTIONS, 0), 0
    for _ in range(DRAWS):
        names = draw.sample(list(OPTIONS), draw.randint(1, 3))
        given = {name: drawn(draw, OPTIONS[name]) for name in names}
        engines = refused(Request("x", (5,), **given).check_options)
        client = refused(lambda given=given: infer_request(None, [5], given, 1.0))
        assert engines == client, given
        if client is None:
            for name in given:
                accepted[name] += 1
            tensors = tensors_of(infer_request(None, [5], given, 1.0))
            why = refused(lambda tensors=tensors: preprocessor.message(tensors, "x"))
            assert why is None or any(words in why for words in OWN_LIMITS), (given, why)
            if why is None:
                reached += 1
                request = preprocessor.message(tensors, "x").request
                for name, value in given.items():
                    assert same(getattr(request, name), value, OPTIONS[name]), (name, value)
    assert min(accepted.values()) > DRAWS / len(OPTIONS) / 10, accepted
    assert DRAWS / 10 < reached < DRAWS / 2


def same(found: object, given: object, option: Option) -> bool:
    """Whether an option arrived: numbers as the float32 that the wire holds, lists as tuples."""
    if option.wire == "FP32":
        return np.float32(found) == np.float32(given)
    return found == (tuple(given) if option.is_list else given)


def test_options_are_typed_as_they_are_declared() -> None:
    """The keywords of a client are the fields of a request, in one order."""
    assert list(Options.__annotations__) == [one.name for one in fields(RequestOptions)]
    for name, option in OPTIONS.items():
        assert option.refusal(option.default, "threshold") is None, name
        assert option.modes, name
        assert option.help.endswith("."), name


@pytest.mark.parametrize("name", [*OPTIONS, "prompt_ids", "as_json"])
def test_run_and_generate_offer_the_same(name) -> None:
    one, other = ({param.name: param for param in verb.params}[name] for verb in (run, generate))
    assert one.opts == other.opts
    assert one.help == other.help
    assert one.to_info_dict() == other.to_info_dict()
    if name in OPTIONS and not OPTIONS[name].is_list and OPTIONS[name].default != "":
        assert f"[default: {OPTIONS[name].default}]" in one.help
