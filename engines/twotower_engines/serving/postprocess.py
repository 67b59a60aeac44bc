"""The model `postprocess`: the ids of one block to the text that they add.

Each response is decoded on its own, so what a decoder needs to know of the answer so far travels
with it: its last tokens, and whether more is to come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from twotower_engines.tokenizer import Tokenizer

from .settings import Settings

__all__ = ["TritonPythonModel", "added_text"]

INCOMPLETE = "\ufffd"  # what decoders put for bytes that are no character, or not yet


def added_text(
    tokenizer: Tokenizer, previous: Sequence[int], ids: Sequence[int], is_last: bool
) -> str:
    """Return the text that some ids add to an answer; the pieces together are the whole text.

    A character whose bytes have begun but not ended decodes to one replacement character at the
    very end. So one of those is held back there, and comes with the next piece, as itself or as
    part of what it became.

    Args:
        tokenizer: Of the model.
        previous: The end of the answer before, enough of it to hold a whole character.
        ids: The new ids.
        is_last: Whether no more ids come, so that nothing may be held back.
    """
    before = tokenizer.decode(previous).removesuffix(INCOMPLETE)
    text = tokenizer.decode([*previous, *ids])
    return (text if is_last else text.removesuffix(INCOMPLETE))[len(before) :]


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read the tokenizer of the engine set that config.pbtxt names."""
        import triton_python_backend_utils as triton

        self._triton = triton
        folder = Settings.of_model(arguments).engines().folder
        self._tokenizer = Tokenizer(folder) if Tokenizer.exists(folder) else None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each response of `generate` with its text; empty without a tokenizer."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        triton = self._triton

        def values(name: str) -> list[Any]:
            found: list[Any] = triton.get_input_tensor_by_name(request, name).as_numpy().tolist()
            return found

        text = ""
        if self._tokenizer is not None:
            is_last = bool(values("finish_reason")[0])
            text = added_text(
                self._tokenizer, values("previous_ids"), values("output_ids"), is_last
            )
        output = triton.Tensor("text_output", np.array([text.encode()], dtype=np.object_))
        return triton.InferenceResponse([output])
