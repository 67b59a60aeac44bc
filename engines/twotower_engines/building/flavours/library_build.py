"""Build an engine of a graph with NVIDIA's Python API, TensorRT's or TensorRT-RTX's.

Runs inside the worker process (`worker.py`) and nowhere else. The module of the API, `tensorrt` or
`tensorrt_rtx`, is an argument; what differs between them is in the job.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower_contract.atomic import partial_file
from twotower_contract.logfile import is_verbose
from twotower_contract.logfile import log as write_log
from twotower_contract.traffic import Listing, Tensor, write_listings
from twotower_engines.building.flavours.compiled import (
    BuilderLog,
    Signature,
    inspected_listing,
)

Report = Callable[[str, int, int], bool]
"""Called with a phase, its steps done and its steps in all; returns False to end the build."""

MESSAGES = 5


class RefusedError(Exception):
    """The library refused a graph or could not build it; the message is the library's own."""


def build_engine_file(trt: Any, job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Build one engine and write it.

    Args:
        trt: The API's module.
        job: `graph`, `plan` and `traffic` (where to write the engine and the listing of its
            kernels), `signature` (the graph's inputs and outputs: name, sizes and type of each),
            `profiles` (list of name to three shapes), `usual` (list of a profile's name and usual
            sizes), `flags` (name of a builder flag to whether it is set), `verbosity` (of
            profiling), and optionally `kernels` (the compute capability to compile our kernels
            for), `hardware` (a hardware compatibility level), `compute_capabilities`,
            `timing_cache` (a file), `layers` (a file: the engine is opened on this machine's GPU,
            and its layers are described there).
        report: Called from the library's threads.

    Returns:
        What the library saw: of the graph (`parsed`), of itself (`flags` that were set), of the
        engine (`bytes`, and `scratch`: bytes that its largest call needs; None where unknown), and
        of the opened engine (`engine`; None where it was not opened).

    Raises:
        RefusedError: The library said no.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    inputs, outputs = (
        tuple(Tensor(name, tuple(sizes), kind) for name, sizes, kind in tensors)
        for tensors in job["signature"]
    )
    signature = inputs, outputs
    _parse(trt, network, log, Path(job["graph"]).read_bytes(), job.get("kernels"))
    _let_attention_decompose(trt, network)
    _check_inputs(network, signature)
    config = builder.create_builder_config()
    for shapes in job["profiles"]:
        _add_profile(builder, config, shapes)
    _configure(trt, config, job)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if job.get("timing_cache"):  # of a failed or interrupted build too: timings are what takes long
        _write(Path(job["timing_cache"]), config.get_timing_cache().serialize())
    if plan is None:
        raise RefusedError(log.text() or "no engine came back, and no message")
    _write(Path(job["plan"]), plan)
    opened = None
    if job.get("layers"):
        engine = _open(trt, log, plan)
        opened = _described(trt, engine, Path(job["layers"]))
        listings = _inspected(trt, engine, job, signature)
    else:
        listings = log.compiled.listings(signature, job["usual"])
    source = "the builder's log" if opened is None else "TensorRT's inspector, on the GPU"
    write_listings(Path(job["traffic"]), source, listings)
    flags = trt.BuilderFlag.__members__
    return {
        "parsed": _parsed(network),
        "flags": [name for name, flag in flags.items() if config.get_flag(flag)],
        "bytes": plan.nbytes,
        "scratch": max((one.scratch for one in listings if one.scratch is not None), default=None),
        "engine": opened,
    }


def parsed_graph(trt: Any, graph: bytes) -> dict[str, Any]:
    """Describe a graph as the library's parser sees it, without building anything.

    Raises:
        RefusedError: It does not parse it.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    _parse(trt, network, log, graph, None)
    return _parsed(network)


def _parsed(network: Any) -> dict[str, Any]:
    """Describe the network as the parser made it of the graph: the builder fuses its layers."""

    def described(one: Any) -> list[Any]:
        return [one.dtype.name, [int(size) for size in one.shape]]

    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return {
        "layers": network.num_layers,
        "inputs": {one.name: described(one) for one in inputs},
        "outputs": {one.name: described(one) for one in outputs},
    }


def _open(trt: Any, log: Any, plan: Any) -> Any:
    """Open a finished engine on this machine's GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise RefusedError(f"the finished engine cannot be opened: {log.text()}")
    return engine


def _described(trt: Any, engine: Any, layers: Path) -> dict[str, Any]:
    """Write the layers of an opened engine to a file.

    Returns:
        How many layers the engine has, how many of each type, and the bytes of device memory that
        its largest profile takes.
    """
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    _write(layers, text.encode())
    found = json.loads(text)["Layers"]
    types = Counter(one["LayerType"] if isinstance(one, dict) else "unknown" for one in found)
    return {
        "layers": len(found),
        "types": dict(types.most_common()),
        "device_memory": int(engine.device_memory_size_v2),
    }


def _inspected(
    trt: Any, engine: Any, job: Mapping[str, Any], signature: Signature
) -> list[Listing]:
    """Return the kernels of each profile of an opened engine, at the profile's usual sizes.

    The inspector knows sizes and types only where it is given a context with all shapes. Such a
    context runs nothing, and so gets no memory.
    """
    listings = []
    for index, ((name, usual), shapes) in enumerate(
        zip(job["usual"], job["profiles"], strict=True)
    ):
        context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        context.set_optimization_profile_async(index, 0)
        for tensor, (_, shape, _) in shapes.items():
            context.set_input_shape(tensor, shape)
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        scratch = int(engine.get_device_memory_size_for_profile_v2(index))
        listings.append(inspected_listing(text, signature, name, usual, scratch))
    return listings


def one_node_engine(trt: Any) -> int:
    """Build a network of one node; returns the size of its plan.

    Raises:
        RefusedError: It cannot be built.
    """
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_strongly_typed(trt))
    x = network.add_input("x", trt.float32, (2, 3))
    network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise RefusedError(log.text() or "no engine came back, and no message")
    return int(plan.nbytes)


def _strongly_typed(trt: Any) -> int:
    # the only mode from TensorRT 11 on, whose successors may drop the flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _log(trt: Any) -> Any:
    """Return a logger that keeps errors and kernels, and writes what it is told into the `--log`.

    A subclass, and so only made once `trt` is there.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.compiled = BuilderLog()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            self.compiled.take(message)
            if severity != trt.ILogger.Severity.VERBOSE or is_verbose():
                write_log(f"TensorRT {severity.name}", message)

        def text(self) -> str:
            return "; ".join(self.errors[-MESSAGES:])

    return Log()


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Follows the outermost phases; the library nests hundreds of short ones in them."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._steps[phase] = steps
            report(phase, 0, steps)

        def phase_finish(self, phase: str) -> None:
            steps = self._steps.pop(phase, 0)
            report(phase, steps, steps)  # a step that follows tells whether to go on

        def step_complete(self, phase: str, step: int) -> bool:
            return report(phase, step + 1, self._steps.get(phase, 0))

    return Monitor()


def _parse(trt: Any, network: Any, log: Any, graph: bytes, kernels: str | None) -> None:
    if kernels is not None:
        graph = _with_plugins(graph, kernels)
    parser = trt.OnnxParser(network, log)
    if parser.parse(graph):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    said = [f"{e.node_operator() or 'graph'} {e.node_name()}: {e.desc()}" for e in errors]
    raise RefusedError("; ".join(said[:MESSAGES]) or log.text() or "the parser gave no reason")


def _with_plugins(graph: bytes, compute_capability: str) -> bytes:
    """Return a graph whose ops are plugin nodes, and register the plugins with TensorRT."""
    import onnx

    from twotower_engines.kernels.plugin_graph import with_plugins
    from twotower_engines.kernels.plugins import register_plugins

    register_plugins(compute_capability)
    made: bytes = with_plugins(onnx.load_from_string(graph)).SerializeToString()
    return made


def _let_attention_decompose(trt: Any, network: Any) -> None:
    """Let attention that no kernel of its own serves (float32, odd heads) be built of products."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer  # the API hands out the base class
            layer.attention.decomposable = True


def _check_inputs(network: Any, signature: Signature) -> None:
    """Compare what the parser made of the inputs with the graph."""
    wanted = {tensor.name: list(tensor.sizes) for tensor in signature[0]}
    found = [network.get_input(index) for index in range(network.num_inputs)]
    shapes = {one.name: [int(size) for size in one.shape] for one in found}
    if sorted(shapes) != sorted(wanted):
        odd = sorted(set(shapes) ^ set(wanted))
        raise RefusedError(f"the parser's inputs are not the graph's, they differ in {odd[:3]}")
    for name, dims in wanted.items():
        expected = [-1 if isinstance(dim, str) else dim for dim in dims]
        if shapes[name] != expected:
            raise RefusedError(f"the parser gives {name} the shape {shapes[name]}, not {dims}")


def _add_profile(builder: Any, config: Any, shapes: Mapping[str, Sequence[Sequence[int]]]) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in shapes.items():
        profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
    if config.add_optimization_profile(profile) < 0:
        raise RefusedError(f"a profile is not valid: {dict(shapes)}")


def _configure(trt: Any, config: Any, job: Mapping[str, Any]) -> None:
    for name, is_set in job["flags"].items():
        flag = getattr(trt.BuilderFlag, name)
        (config.set_flag if is_set else config.clear_flag)(flag)
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, job["verbosity"])
    if job.get("hardware"):
        level = getattr(trt.HardwareCompatibilityLevel, job["hardware"])
        config.hardware_compatibility_level = level
    targets = job.get("compute_capabilities") or []
    if targets:
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            name = "SM" + target.replace(".", "")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if job.get("timing_cache"):
        path = Path(job["timing_cache"])
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            # of another TensorRT or another GPU: start over rather than refuse to build
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write(path: Path, content: Any) -> None:
    with partial_file(path) as partial, partial.open("wb") as stream:
        stream.write(memoryview(content))
