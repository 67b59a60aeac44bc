"""The CPU flavour: ONNX Runtime sessions over the float32 graphs.

Weights lie in the sessions, packed (`packed_session`): a call only binds ids, lengths and states. A
slot's Mamba states are arrays that no call writes in place: an extension returns new ones and the
slot takes them over, so that keeping the previous ones is keeping a reference. Keys and values are
written in place, into buffers that grow by half: an extension writes behind the context's, a
denoise step at the end. Several slots are denoised in arrays of their own (`host_states.Batch`),
and extended there where they lie side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from twotower_contract.engine_set import EngineSet
from twotower_contract.errors import TwoTowerError
from twotower_contract.onnxruntime import import_onnxruntime
from twotower_engines.artifacts.weights import Progress, WeightStore
from twotower_engines.errors import RuntimeLoadError
from twotower_engines.runtime import denormals
from twotower_engines.runtime.host_states import (
    CAPACITY_STEP,
    Batch,
    HostStates,
    Slot,
    States,
    StateShapes,
)
from twotower_engines.runtime.int8_products import use_int8
from twotower_engines.runtime.interface import CLOSED, Denoised, DenoiseRow, ExtendRow, PredictRow
from twotower_engines.runtime.mamba_recurrence import whole_chunks
from twotower_engines.runtime.mamba_steps import replace_mamba_steps
from twotower_engines.runtime.modulations import replace_modulations
from twotower_engines.runtime.packed_session import packed_session
from twotower_engines.runtime.pruning import flat_graph, make_optional, prune, replace_norms
from twotower_engines.runtime.routed_experts import parts_of, replace_experts
from twotower_engines.runtime.vocabulary_passes import refine_masked_rows

Array = npt.NDArray[Any]
Row = TypeVar("Row", ExtendRow, DenoiseRow)
DENOISER_OUTPUTS = ("new_ids", "still_masked", "confidence", "logits")
LOGITS_WANTED = "logits_wanted"
"""Input of a session: whether the logits are read."""


@dataclass(slots=True)
class _Binding:
    """An I/O binding of one session, for one choice of outputs.

    Attributes:
        inputs: Names that its graph reads.
        held: Those bound last; ONNX Runtime does not keep the arrays behind values alive.
    """

    session: Any
    io: Any
    inputs: frozenset[str]
    held: dict[str, Array] = field(default_factory=dict)


class OnnxRuntime:
    """A runtime on the CPU; see `runtime.interface.Runtime` for its methods.

    Args:
        engines: An engine set of flavour `onnxruntime`.
        checkpoint: The checkpoint's folder, where it is not the one in the manifest.
        threads: Threads of one operator; None for one per core.
        progress: Called with the bytes of weights that are bound, and their sum.
        int8: Whether to compute products in 8 bits; see `runtime.int8_products`.
    """

    def __init__(
        self,
        engines: EngineSet,
        checkpoint: Path | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
        int8: bool = False,
    ) -> None:
        self._ort = _import_onnxruntime()
        self._int8 = int8
        model = engines.manifest.model
        self.limits = engines.build.limits
        self.vocab_size = model.vocab_size
        self.mask_token_id = model.mask_token_id
        self.eos_token_ids = model.eos_token_ids
        self.has_denoiser = "denoiser" in engines.build.plans
        engines.check_engine_files()
        store = WeightStore(engines.manifest, checkpoint)
        store.check()
        self.state_shapes = StateShapes.of(model)
        self._mapped = 0  # bytes of weights that are read where they lie in the checkpoint
        context = self._session(engines, store, "context", threads, progress)
        self._bindings = {call: _binding(context) for call in ("extend", "extend with logits")}
        if self.has_denoiser:
            denoiser = self._session(engines, store, "denoiser", threads, progress)
            self._bindings |= {call: _binding(denoiser) for call in ("denoise", "predict")}
        if self._mapped:
            print(
                f"note: {self._mapped / 1e9:.1f} GB of float32 weights are used where they lie: "
                f"leave the files in {store.folder} as they are while these engines run",
                file=sys.stderr,
            )
        self._slots = [self._empty_slot() for _ in range(self.limits.slots)]
        self._batch = Batch(self.limits.slots, self.state_shapes)

    def reset(self, slot: int) -> None:
        """Empty a slot: no tokens, zero states."""
        self._check_open()
        self._slots[slot] = self._empty_slot()

    def extend(self, rows: Sequence[ExtendRow]) -> list[npt.NDArray[np.float32] | None]:
        """Append tokens to the context of some slots, in one call of the context engine."""
        self._check_open()
        slots = [self._slots[row.slot] for row in rows]
        tokens = whole_chunks(max(row.ids.size for row in rows))
        held = self._batch.take_held(slots, tokens) if len(rows) > 1 else None
        places, states = held or (list(range(len(rows))), self._gather(slots, tokens))
        asked = list(rows)
        rows, slots = _by_place(places, rows, slots)
        inputs: dict[str, Array] = {
            "ids": _padded([row.ids for row in rows], tokens),
            "lengths": np.array([row.ids.size for row in rows], np.int32),
            "context_lengths": np.array([slot.length for slot in slots], np.int32),
            **self.state_shapes.named(states),
        }
        new = self.state_shapes.empty_mamba(len(rows))
        outputs = self.state_shapes.named_mamba(new, "_new") | self._in_place(states)
        wanted = any(row.logits for row in rows)
        if wanted:
            outputs["logits"] = np.empty((len(rows), self.vocab_size), np.float32)
        self._run("extend with logits" if wanted else "extend", inputs, outputs)
        for index, (row, slot) in enumerate(zip(rows, slots, strict=True)):
            self._advance(slot, row, index, States(new, states.caches))
        return [
            outputs["logits"][place] if row.logits else None
            for place, row in zip(places, asked, strict=True)
        ]

    def denoise(self, rows: Sequence[DenoiseRow]) -> list[Denoised]:
        """Refine one block of each row, in one call of the denoiser engine."""
        self._check_open()
        slots = [self._slots[row.slot] for row in rows]
        block = max(row.ids.size for row in rows)
        if len(rows) == 1:
            places, states = [0], self._gather(slots, block)
        else:
            places, states = self._batch.take(slots, block)
        rows, slots = _by_place(places, rows, slots)
        inputs = {
            "ids": _padded([row.ids for row in rows], block),
            "lengths": np.array([row.ids.size for row in rows], np.int32),
            "context_lengths": np.array([slot.length for slot in slots], np.int32),
            "conditioned": np.ones(len(rows), np.int32),
            "threshold": np.array([row.threshold for row in rows], np.float32),
            "steps_left": np.array([row.steps_left for row in rows], np.int32),
            "temperature": np.array([row.temperature for row in rows], np.float32),
            "policy": np.array([row.policy for row in rows], np.int32),
            "seed": np.array([row.seed for row in rows], np.int32),
            **self.state_shapes.named(states),
        }
        new_ids = np.empty((len(rows), block), np.int32)
        still_masked = np.empty(len(rows), np.int32)
        confidence = np.empty((len(rows), block), np.float32)
        outputs = {"new_ids": new_ids, "still_masked": still_masked, "confidence": confidence}
        outputs |= self._in_place(states)
        self._run("denoise", inputs, outputs)
        return [
            Denoised(
                new_ids[place, : rows[place].ids.size],
                int(still_masked[place]),
                confidence[place, : rows[place].ids.size],
            )
            for place in places
        ]

    def predict(self, rows: Sequence[PredictRow]) -> npt.NDArray[np.float32]:
        """Run the denoiser tower on each slot's last token to predict the next."""
        self._check_open()
        slots = [self._slots[row.slot] for row in rows]
        count = len(rows)
        ones = np.ones(count, np.int32)
        states = self._gather(slots, 1, previous=True)
        inputs = {
            "ids": np.array([[row.id] for row in rows], np.int32),
            "lengths": ones,
            "context_lengths": np.array([slot.length - 1 for slot in slots], np.int32),
            "conditioned": np.zeros(count, np.int32),
            "threshold": np.ones(count, np.float32),
            "steps_left": ones,
            "temperature": np.zeros(count, np.float32),
            "policy": np.zeros(count, np.int32),
            "seed": np.zeros(count, np.int32),
            **self.state_shapes.named(states),
        }
        logits = np.empty((count, 1, self.vocab_size), np.float32)
        self._run("predict", inputs, {"logits": logits, **self._in_place(states)})
        return logits[:, 0]

    def state_store(self, size: int, tokens: int) -> HostStates:
        """Return room for prefixes in host memory."""
        return HostStates(self._slots, size, tokens, self.limits.context)

    def close(self) -> None:
        """Free the sessions, the weights and the states; a second time does nothing."""
        self._bindings.clear()
        self._slots.clear()
        self._batch = Batch(0, self.state_shapes)

    def _check_open(self) -> None:
        if not self._slots:
            raise RuntimeError(CLOSED)

    def _session(
        self,
        engines: EngineSet,
        store: WeightStore,
        tower: str,
        threads: int | None,
        progress: Progress | None,
    ) -> Any:
        """Open the graph of a tower with its weights, cut down to the outputs that calls read."""
        options = self._ort.SessionOptions()
        # By default one per core: the rows of a turn are one call, and nothing runs beside it. A
        # second thread costs a small model nothing (2.20 against 2.26 ms of CPU time a call): its
        # operators are below the size from which ONNX Runtime shares one out.
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # shapes change from call to call, so planning memory by shape would only cost
        options.enable_mem_pattern = False
        # waiting threads sleep: a server's other processes need the cores between calls
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if denormals.can_flush():
            options.add_session_config_entry(denormals.OPTION, "1")
        options.log_severity_level = 3
        path = engines.engine_path(tower)
        try:
            model = flat_graph(path)
            replace_mamba_steps(model.graph, with_states=tower == "context")
            made = [f"{name}_new" for names, _ in self.state_shapes.mamba for name in names]
            caches = [f"{name}_new" for name in self.state_shapes.caches]
            read = [*made, "logits"] if tower == "context" else DENOISER_OUTPUTS
            prune(model.graph, [*read, *caches])
            replace_norms(model.graph, engines.manifest.model.norm_eps)
            replace_modulations(model.graph)
            experts = replace_experts(model.graph)
            if tower == "denoiser":
                model = refine_masked_rows(
                    model, LOGITS_WANTED, self.vocab_size, self.mask_token_id
                )
            del model.functions[:]  # of what is written anew
            narrow = use_int8(model) if self._int8 else {}
            make_optional(model.graph, "logits", LOGITS_WANTED)
            weights = (
                part
                for bank in store.all_float32(tower, progress)
                for matrix in parts_of(experts, *bank)
                for part in parts_of(narrow, *matrix)
            )
            with denormals.denormals_as_zero():  # which the first session would change for good
                session, kept = packed_session(self._ort, model, weights, options)
        except TwoTowerError:
            raise
        except Exception as problem:  # ONNX's and its Runtime's own exceptions share no useful base
            raise RuntimeLoadError(
                f"{path}: ONNX Runtime {self._ort.__version__} cannot load it: {problem}"
            ) from problem
        self._mapped += store.mapped_bytes(tower, kept)
        return session

    def _run(self, call: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        """Run a session: read `inputs`, and write `outputs` in place."""
        binding = self._bindings[call]
        inputs[LOGITS_WANTED] = np.array(["logits" in outputs])
        for name in binding.inputs & inputs.keys():
            binding.io.bind_cpu_input(name, inputs[name])
        for name, array in outputs.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(array)
            binding.io.bind_ortvalue_output(name, value)
        if not outputs:  # a tower of experts alone has no states to extend
            return
        binding.held = {**inputs, **outputs}
        with denormals.denormals_as_zero():
            binding.session.run_with_iobinding(binding.io)

    def _empty_slot(self) -> Slot:
        states = self.state_shapes.empty(1, CAPACITY_STEP)
        # before the first token the states are zero as well, so one token is a prompt too
        return Slot(0, states, states.mamba)

    def _gather(self, slots: Sequence[Slot], tokens: int, previous: bool = False) -> States:
        """Return the states of a batch; a slot's own arrays where the batch is one slot.

        Args:
            slots: Different slots.
            tokens: Tokens of a row in the call, for which there is room behind each context.
            previous: Take the Mamba states before the last token.
        """
        needed = max(slot.length for slot in slots) + tokens
        if len(slots) == 1:
            slots[0].make_room(needed, self.limits.cache_tokens)
            return States(_mamba(slots[0], previous), slots[0].states.caches)
        mamba = zip(*(_mamba(slot, previous) for slot in slots), strict=True)
        # zero, not empty: values past a row's length are masked, but must be finite
        capacity = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        caches = self.state_shapes.empty_caches(len(slots), capacity)
        for index, slot in enumerate(slots):
            caches[:, index, :, : slot.length] = slot.states.caches[:, 0, :, : slot.length]
        return States(tuple(np.concatenate(rows, axis=1) for rows in mamba), caches)

    def _in_place(self, states: States) -> dict[str, Array]:
        """Return the outputs that are written into inputs: keys and values."""
        return self.state_shapes.named_caches(states.caches, "_new")

    def _advance(self, slot: Slot, row: ExtendRow, index: int, made: States) -> None:
        """Take over the states that a call made for one slot, whose row has this index."""
        end = slot.length + row.ids.size
        if made.caches is not slot.states.caches:
            slot.make_room(end, self.limits.cache_tokens)
            new = made.caches[:, index, :, slot.length : end]
            slot.states.caches[:, 0, :, slot.length : end] = new
        slot.previous = slot.states.mamba if row.keep_previous else None
        mamba = tuple(array[:, index : index + 1] for array in made.mamba)
        slot.states = slot.states._replace(mamba=mamba)
        slot.length = end


def _binding(session: Any) -> _Binding:
    inputs = frozenset(value.name for value in session.get_inputs())
    return _Binding(session, session.io_binding(), inputs)


def _import_onnxruntime() -> Any:
    try:
        return import_onnxruntime()
    except ImportError as problem:
        raise RuntimeLoadError(
            "ONNX Runtime is not installed; install it with `pip install 'twotower[build]'`"
        ) from problem


def _mamba(slot: Slot, previous: bool) -> tuple[Array, ...]:
    if not previous:
        return slot.states.mamba
    assert slot.previous is not None, "predict needs an extend with keep_previous before it"
    return slot.previous


def _by_place(
    places: Sequence[int], rows: Sequence[Row], slots: Sequence[Slot]
) -> tuple[list[Row], list[Slot]]:
    """Return rows and their slots in the order of their places in a batch."""
    by_place = sorted(zip(places, rows, slots, strict=True), key=lambda one: one[0])
    return [row for _, row, _ in by_place], [slot for *_, slot in by_place]


def _padded(rows: Sequence[npt.NDArray[np.int32]], width: int) -> npt.NDArray[np.int32]:
    """Stack rows of ids; the engines ignore ids past the length of a row."""
    padded = np.zeros((len(rows), width), np.int32)
    for target, row in zip(padded, rows, strict=True):
        target[: row.size] = row
    return padded
