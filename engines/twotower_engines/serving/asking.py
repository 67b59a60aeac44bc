"""Questions to a running server: does a model answer, is it ready; and to load a model again.

Readiness proves nothing: a server (2.51) reports a model as ready whose process was killed. So the
model is asked for an answer of its own, a probe. The engine's thread gives it between two turns,
before all requests that wait, so it comes while any number of streams is open.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from twotower_engines.errors import ServingError

# Where Triton looks for the key of a restricted part of its protocol.
KEY_HEADER = "triton-grpc-protocol-"
CONTROL = "twotower-control"  # models, shared memory, logging, tracing: for `serve` alone
ACCESS = "twotower-access"  # requests: for callers who have the key
LOAD_SECONDS = 600.0
# A server that starts is tried again soon; by default after 1 s, then ever more rarely.
RECONNECT = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]


class NoAnswerError(ServingError):
    """A server or a model did not answer as it should."""

    exit_code = 1


class Asker:
    """A connection to a server, for questions that have an answer within seconds.

    Args:
        address: `host:port` of gRPC.
        credentials: From `grpc.ssl_channel_credentials`; None for no encryption.
        name: The host name in the server's certificate, where it is not that of the address.
        keys: Keys of restricted protocols, by the name of the restriction.
    """

    def __init__(
        self,
        address: str,
        credentials: Any = None,
        name: str | None = None,
        keys: dict[str, str] | None = None,
    ) -> None:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self.address = address
        self._metadata: Sequence[tuple[str, str]] = tuple(
            (f"{KEY_HEADER}{key}", value) for key, value in (keys or {}).items()
        )
        # A server on this machine is not reached through a proxy.
        options: list[tuple[str, Any]] = [("grpc.enable_http_proxy", 0), *RECONNECT]
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            named = [("grpc.ssl_target_name_override", name)] if name else []
            self._channel = grpc.secure_channel(address, credentials, options=options + named)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def probe(self, model: str, timeout: float) -> dict[str, Any]:
        """Ask a model, `twotower` or `ensemble`, for an answer.

        Returns:
            From `twotower` the state of its engine loop; from `ensemble` nothing.

        Raises:
            NoAnswerError: There was none in that many seconds, or an error.
        """
        import grpc
        from tritonclient.grpc import InferResult, service_pb2

        request = service_pb2.ModelInferRequest(model_name=model)
        request.inputs.add(name="probe", datatype="INT32", shape=[1])
        request.raw_input_contents.append((1).to_bytes(4, "little"))
        ask = self._stub.ModelStreamInfer
        try:
            # To its end: a call that is dropped after its last response stays in the server (2.51).
            parts = list(ask(iter([request]), timeout=timeout, metadata=self._metadata))
        except grpc.RpcError as problem:
            raise NoAnswerError(self._words(model, problem)) from None
        if not parts:
            raise NoAnswerError(f"{model} gave no answer")
        if parts[0].error_message:
            raise NoAnswerError(f"{model} answers with an error: {parts[0].error_message}")
        text = InferResult(parts[0].infer_response).as_numpy("text_output")[0].decode()
        return dict(json.loads(text or "{}"))

    def is_ready(self, model: str) -> bool:
        """Return whether the server says that a model is loaded."""
        import grpc
        from tritonclient.grpc import service_pb2

        request = service_pb2.ModelReadyRequest(name=model)
        try:
            return bool(self._stub.ModelReady(request, timeout=2, metadata=self._metadata).ready)
        except grpc.RpcError:
            return False

    def answered(self, model: str) -> int:
        """Return how many requests a model has answered since it was loaded, with errors too.

        Raises:
            NoAnswerError: The server did not say.
        """
        import grpc
        from tritonclient.grpc import service_pb2

        request = service_pb2.ModelStatisticsRequest(name=model)
        try:
            told = self._stub.ModelStatistics(request, timeout=2, metadata=self._metadata)
        except grpc.RpcError as problem:
            raise NoAnswerError(self._words(model, problem)) from None
        counts = [one.inference_stats for one in told.model_stats]
        return sum(one.success.count + one.fail.count for one in counts)

    def reload(self, model: str) -> None:
        """Unload a model and load it again; `load` alone does not bring back a dead process.

        Raises:
            NoAnswerError: The server could not.
        """
        from tritonclient.grpc import service_pb2

        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        self._control(self._stub.RepositoryModelUnload, request)
        self.load(model)

    def load(self, model: str) -> None:
        """Load a model.

        Raises:
            NoAnswerError: The server could not.
        """
        from tritonclient.grpc import service_pb2

        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        self._control(self._stub.RepositoryModelLoad, request)

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _control(self, call: Any, request: Any) -> None:
        import grpc

        try:
            call(request, timeout=LOAD_SECONDS, metadata=self._metadata)
        except grpc.RpcError as problem:
            raise NoAnswerError(self._words(request.model_name, problem)) from None

    def _words(self, model: str, problem: Any) -> str:
        return f"{model} at {self.address}: {problem.code().name}: {problem.details()}"
