"""Write a quantized checkpoint: shard by shard, in bounded memory, resumable.

Each shard of the source becomes a shard of the same name. They are written to a folder beside the
output, which takes its place when the last one is complete. A run that was ended leaves this folder
with its complete shards, and the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from twotower_contract.atomic import (
    WITH_CARE,
    Writing,
    check_replaceable,
    locked,
    partial_file,
    put_in_place,
    reported,
)
from twotower_contract.config import CONFIG_FILE
from twotower_contract.errors import CheckpointError
from twotower_contract.index import INDEX_FILE
from twotower_contract.json_file import format_of, read_json, write_json
from twotower_contract.machine import cores
from twotower_contract.quantized import HF_QUANT_FILE, Shape, stored_tensors
from twotower_contract.shards import ITEM_SIZES, TensorEntry
from twotower_export.checkpoint import SMALL_FILES, Checkpoint
from twotower_export.progress import Progress, silent
from twotower_export.quantization.encoding import Encoded, encode, largest_magnitude
from twotower_export.quantization.recipe import Recipe
from twotower_export.quantization.report import Matrix, parts_of_report
from twotower_export.quantization.settings import hf_quant_config, quantization_config
from twotower_export.shard_writing import tensor_pieces, write_header

REPORT_FILE: Final = "quantization.json"
FORMAT: Final = "twotower-quantization"
FORMAT_VERSION: Final = 1
STATE: Final = "state"
BYTES_AT_WORK: Final = 256 * 10**6
"""Most bytes of matrices that are read and not yet written, unless a single one has more."""

_LEFT_OUT: Final = (CONFIG_FILE, INDEX_FILE, HF_QUANT_FILE, REPORT_FILE, "golden.json")
"""Small files that are written anew, or no longer true."""

Stored = dict[str, tuple[str, Shape]]


@dataclass(frozen=True, slots=True)
class _Step:
    """A tensor of the source, and the tensors that it becomes, dtype and shape by name."""

    name: str
    tensor: TensorEntry
    becomes: Stored


def quantize_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    progress: Progress = silent,
    writing: Writing = WITH_CARE,
) -> dict[str, Any]:
    """Write a quantized checkpoint to `out`.

    Args:
        checkpoint: The source.
        out: A folder; an earlier output is replaced.
        recipe: The format of each matrix.
        progress: Called with megabytes of the source.
        writing: Whether to replace whatever is there, or to write nothing.

    Returns:
        The content of the report file.

    Raises:
        CheckpointError: `out` holds something else, the disk is too small, another process is at
            work on it, or a weight is no finite number.
    """
    what = "a quantized checkpoint"
    check_replaceable(out, what, is_quantized_output, CheckpointError, writing)
    steps = _steps(checkpoint, recipe)
    size = sum(_size(*entry) for step in steps for entry in step.becomes.values())
    writing.begin(out, f"{what} of {size / 1e9:.2f} GB")
    with reported(out, CheckpointError):
        place = out.resolve()
        work = place.with_name(f".quantizing-{place.name}")
        (work / STATE).mkdir(parents=True, exist_ok=True)
        with locked(work, lambda: _refuse_another(out)):
            _resume(work, checkpoint, recipe)
            _check_room(out, work, size)
            report = _write_all(checkpoint, recipe, steps, work, progress)
            shutil.rmtree(work / STATE)
            work.chmod(0o755)
            put_in_place(work, place)
            shutil.rmtree(work, ignore_errors=True)  # what lay there before, if anything did
    return report


def is_quantized_output(folder: Path) -> bool:
    """Whether a folder was written by `quantize_checkpoint`."""
    return bool(format_of(folder / REPORT_FILE) == FORMAT)


def _refuse_another(out: Path) -> None:
    raise CheckpointError(f"{out}: another process is writing it; wait for it, or end it")


def _resume(work: Path, checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Keep what an earlier run of the same source and recipe left; remove any other."""
    identity = {
        "fingerprint": checkpoint.fingerprint,
        "recipe": recipe.digest,
        "version": importlib.metadata.version("twotower"),
    }
    path = work / STATE / "identity.json"
    is_same = False
    if path.exists():
        with contextlib.suppress(CheckpointError):
            is_same = read_json(path, CheckpointError).values == identity
    if not is_same:
        for one in (*work.glob("*.safetensors*"), *(work / STATE).iterdir()):
            one.unlink()
        write_json(path, identity)


def _check_room(out: Path, work: Path, size: int) -> None:
    """Refuse a disk that cannot hold what is still to be written; leave only what was kept."""
    there = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    free = shutil.disk_usage(work).free
    if free < size - there:
        if not there:
            shutil.rmtree(work)
        raise CheckpointError(
            f"{out}: {(size - there) / 1e9:.1f} GB are still to be written and the disk has "
            f"{free / 1e9:.1f} GB left; name a folder on another disk"
        )


def _steps(checkpoint: Checkpoint, recipe: Recipe) -> list[_Step]:
    """Return the tensors of the source in the order in which they lie."""
    steps = []
    for name, tensor in checkpoint.tensors.items():
        becomes: Stored = {name: (tensor.dtype, tensor.shape)}
        if name in recipe.formats:
            out, into = tensor.shape
            becomes = stored_tensors(
                recipe.formats[name], name, (out, into), recipe.group, tensor.dtype
            )
        steps.append(_Step(name, tensor, becomes))
    return sorted(steps, key=lambda step: (step.tensor.shard, step.tensor.begin))


def _write_all(
    checkpoint: Checkpoint,
    recipe: Recipe,
    steps: list[_Step],
    work: Path,
    progress: Progress,
) -> dict[str, Any]:
    total = sum(step.tensor.bytes for step in steps)
    matrices: list[Matrix] = []
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress("quantizing megabytes", done // 10**6, total // 10**6)

    for number, shard in enumerate(checkpoint.shards):
        some = [step for step in steps if step.tensor.shard == number]
        state = work / STATE / f"{shard.file}.json"
        if state.exists():
            advance(sum(step.tensor.bytes for step in some))
        else:
            with partial_file(work / shard.file) as partial, partial.open("wb") as target:
                written = _write_shard(checkpoint, recipe, some, target, advance)
            write_json(state, {"matrices": [asdict(matrix) for matrix in written]})
        record = read_json(state, CheckpointError)
        matrices += [one.record(Matrix) for one in record.items("matrices")]
    _write_small_files(checkpoint, recipe, steps, work)
    report = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": checkpoint.id or str(checkpoint.path),
        "source_fingerprint": checkpoint.fingerprint,
        "scales": recipe.scales,
        "group_size": recipe.group or None,
        "bytes_before": total,
        "bytes_after": sum(_size(*entry) for step in steps for entry in step.becomes.values()),
        "parts": parts_of_report(checkpoint.config, checkpoint.base, matrices),
    }
    write_json(work / REPORT_FILE, report)
    return report


def _write_shard(
    checkpoint: Checkpoint,
    recipe: Recipe,
    steps: list[_Step],
    target: BinaryIO,
    advance: Callable[[int], None],
) -> list[Matrix]:
    """Write a shard; its matrices are quantized in threads, ahead of the writing."""
    write_header(target, {n: entry for step in steps for n, entry in step.becomes.items()})
    matrices = []
    narrow = [step for step in steps if step.name in recipe.formats]
    with contextlib.closing(_encoded(checkpoint, recipe, narrow)) as results:
        for step in steps:
            if step.name in recipe.formats:
                encoded = next(results)
                for array in encoded.arrays:
                    target.write(array.data if array.ndim else array.tobytes())
                matrices.append(_matrix(step, recipe, encoded))
                advance(step.tensor.bytes)
            else:
                for piece in tensor_pieces(checkpoint, step.tensor):
                    target.write(piece)
                    advance(len(piece))
    return matrices


def _encoded(checkpoint: Checkpoint, recipe: Recipe, steps: list[_Step]) -> Generator[Encoded]:
    """Yield the matrices in order, while the next ones are worked on."""
    waiting: deque[tuple[Future[Encoded], int]] = deque()
    held = 0
    with ThreadPoolExecutor(cores(), "twotower-quantize") as workers:
        try:
            for step in steps:
                size = step.tensor.bytes
                while waiting and held + size > BYTES_AT_WORK:
                    future, count = waiting.popleft()
                    yield future.result()
                    held -= count
                    del future
                waiting.append((workers.submit(_encode, checkpoint, recipe, step), size))
                held += size
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            workers.shutdown(wait=True, cancel_futures=True)


def _encode(checkpoint: Checkpoint, recipe: Recipe, step: _Step) -> Encoded:
    fused = [name for name in fused_with(step.name) if recipe.formats.get(name) == "nvfp4"]
    try:
        largest = None
        if fused and recipe.formats[step.name] == "nvfp4":
            largest = max(largest_magnitude(_stored(checkpoint, name)) for name in fused)
        stored = _stored(checkpoint, step.name)
        return encode(stored, recipe.formats[step.name], recipe.group, recipe.scales, largest)
    except ValueError as problem:
        raise CheckpointError(
            f"{checkpoint.path}: {step.name}: {problem}; the checkpoint is damaged: download it "
            "again"
        ) from problem


def fused_with(name: str) -> list[str]:
    """Return the matrices that servers join with one, itself included; nothing where none are.

    vLLM joins queries, keys and values and wants one `weight_scale_2` for all; ModelOpt writes one.
    """
    found = re.fullmatch(r"(.*\.)[qkv]_proj\.weight", name)
    return [f"{found[1]}{one}_proj.weight" for one in "qkv"] if found else []


def _stored(checkpoint: Checkpoint, name: str) -> Any:
    """Return a matrix as it is stored: float32, or the bits of bfloat16."""
    tensor = checkpoint.tensors[name]
    content = b"".join(tensor_pieces(checkpoint, tensor))
    dtype = np.uint16 if tensor.dtype == "BF16" else np.float32
    return np.frombuffer(content, dtype).reshape(tensor.shape)


def _matrix(step: _Step, recipe: Recipe, encoded: Encoded) -> Matrix:
    return Matrix(
        step.name,
        recipe.formats[step.name],
        step.tensor.bytes,
        sum(_size(*entry) for entry in step.becomes.values()),
        encoded.error,
        encoded.energy,
    )


def _write_small_files(
    checkpoint: Checkpoint, recipe: Recipe, steps: list[_Step], work: Path
) -> None:
    for file in sorted(checkpoint.path.iterdir()):
        if file.suffix in (*SMALL_FILES, ".py") and file.name not in _LEFT_OUT:
            shutil.copyfile(file, work / file.name)
    weight_map = {
        name: checkpoint.shards[step.tensor.shard].file for step in steps for name in step.becomes
    }
    size = sum(_size(*entry) for step in steps for entry in step.becomes.values())
    index: Mapping[str, Any] = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_json(work / INDEX_FILE, dict(index))
    settings = hf_quant_config(checkpoint, recipe)
    if settings is not None:
        write_json(work / HF_QUANT_FILE, settings)
    values = read_json(checkpoint.path / CONFIG_FILE).values
    values["quantization_config"] = quantization_config(checkpoint, recipe)
    write_json(work / CONFIG_FILE, values)


def _size(dtype: str, shape: Shape) -> int:
    return ITEM_SIZES[dtype] * math.prod(shape)
