"""The model `postprocessing`: the ids of one block to the text that they add, for the ensemble.

Each response is decoded on its own, so what a decoder needs to know of the answer so far travels
with it: its last tokens, and whether more is to come. The text of a request with stop strings
comes as it is: part of it may be held back.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from twotower_engines.artifacts.tokenizer import Tokenizer, added_text
from twotower_engines.serving.settings import Settings


class TritonPythonModel:
    """The model class that Triton loads."""

    def initialize(self, arguments: dict[str, str]) -> None:
        """Read the tokenizer of the engine set that config.pbtxt names."""
        import triton_python_backend_utils as triton

        self._triton = triton
        folder = Settings.of_model(arguments).engines().folder
        self._tokenizer = Tokenizer(folder) if Tokenizer.exists(folder) else None

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each response of `twotower` with its text; empty without a tokenizer."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        triton = self._triton

        def values(name: str) -> list[Any]:
            found: list[Any] = triton.get_input_tensor_by_name(request, name).as_numpy().tolist()
            return found

        text = ""
        given = values("stop_text")
        if given:
            text = given[0].decode()
        elif self._tokenizer is not None:
            is_last = bool(values("finish_reason")[0])
            text = added_text(
                self._tokenizer, values("previous_ids"), values("output_ids"), is_last
            )
        output = triton.Tensor("text_output", np.array([text.encode()], dtype=np.object_))
        return triton.InferenceResponse([output])
