"""The golden self-test: engines answer a fixed prompt, as the bundle says that they must.

It exists because a broken stack need not fail: users of the reference code got word salad, one
token per denoiser call, and no error. `run_self_test` uses the same scheduler as every request and
names the kind of failure that it met. Where no answer is known, or these engines are too small for
it, it looks for what no right answer has (`invariants`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from twotower_contract.engine_set import EngineSet
from twotower_contract.errors import BundleError
from twotower_contract.json_file import Document
from twotower_contract.manifest import MANIFEST_FILE
from twotower_engines.errors import GenerationError, RequestError
from twotower_engines.generation.generator import Result
from twotower_engines.generation.request import Request, RequestLimits
from twotower_engines.runtime.interface import Runtime
from twotower_engines.verify.invariants import objections, run_request, shortened

Status = Literal["passed", "deviates", "plausible", "failed", "unavailable"]

EXACT_PRECISION = "float32"
"""Precision of the golden answer; engines of another one may deviate where two tokens are close."""

CALLS_FACTOR = 2.0
"""A deviating answer may take so many times as many denoiser calls, and no more."""


class GoldenMissingError(Exception):
    """A bundle holds no golden answer; the message says why."""


@dataclass(frozen=True, slots=True)
class GoldenAnswer:
    """The request of the self-test and the answer that must follow.

    Attributes:
        request: Greedy mask diffusion, or autoregressive where there is no denoiser.
        output_ids: The new tokens, without the prompt.
        denoiser_calls: Denoiser calls that they take.
        computed_with: The software that computed it.
    """

    request: Request
    output_ids: tuple[int, ...]
    denoiser_calls: int
    computed_with: str


@dataclass(frozen=True, slots=True)
class SelfTestResult:
    """Outcome of the self-test.

    Attributes:
        status: `passed`: the same tokens, of float32 engines in as many calls. `deviates`: engines
            of lower precision than the golden answer, which agree with it at first. `plausible`:
            there is no golden answer, or the engines are too small for it, and their answer has
            nothing that no right answer has. `failed`. `unavailable`: not even that could be
            tested.
        reason: One sentence for people.
        equal_tokens: Tokens before the first that differs.
        tokens: Tokens of the answer.
        denoiser_calls: Denoiser calls that the engines made.
        expected_calls: Denoiser calls of the golden answer.
        seconds: Time that the answer took.
    """

    status: Status
    reason: str
    equal_tokens: int = 0
    tokens: int = 0
    denoiser_calls: int = 0
    expected_calls: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the engines may serve."""
        return self.status != "failed"

    def require(self) -> None:
        """Raise if it failed.

        Raises:
            GenerationError: With the reason.
        """
        if not self.ok:
            raise GenerationError(f"golden self-test: {self.reason}")


def run_self_test(engines: EngineSet, runtime: Runtime) -> SelfTestResult:
    """Run the golden request on loaded engines that do nothing else at the time.

    Raises:
        BundleError: The manifest's golden block is malformed.
    """
    limits = RequestLimits.of_runtime(runtime)
    try:
        golden = golden_answer(engines)
        golden.request.check(limits)
    except GoldenMissingError as problem:
        return _test_without_answer(engines, runtime, str(problem))
    except RequestError as problem:
        return _test_without_answer(engines, runtime, f"these engines cannot run it: {problem}")
    try:
        result = run_request(runtime, golden.request)
    except GenerationError as problem:
        return SelfTestResult("failed", str(problem), tokens=len(golden.output_ids))
    return judge(golden, result, engines.build.precision)


def _test_without_answer(engines: EngineSet, runtime: Runtime, why: str) -> SelfTestResult:
    """Test engines without a golden answer; `why` says why there is none."""
    limits = RequestLimits.of_runtime(runtime)
    try:
        request = shortened(golden_request(engines), limits)
        if request is None:
            return SelfTestResult("unavailable", f"{why}; and no answer of two blocks fits")
        request.check(limits)
    except (BundleError, RequestError) as problem:
        return SelfTestResult("unavailable", f"{why}; {problem}")
    try:
        result = run_request(runtime, request)
        flaws = objections(runtime, request, result)
    except GenerationError as problem:
        return SelfTestResult("failed", str(problem))
    tokens, calls = len(result.output_ids) - len(request.prompt_ids), result.denoiser_calls
    if flaws:
        reason = (
            f"{'; '.join(flaws)}. That is what broken engines of a trained model give; "
            f"`twotower verify` compares them with the checkpoint ({why})"
        )
        return SelfTestResult("failed", reason, 0, tokens, calls, seconds=result.seconds)
    reason = (
        f"{tokens} tokens in {calls} denoiser calls, in which nothing is plainly wrong; "
        f"whether they are the right ones is not known: {why}"
    )
    return SelfTestResult("plausible", reason, 0, tokens, calls, seconds=result.seconds)


def golden_answer(engines: EngineSet) -> GoldenAnswer:
    """Read the golden block of an engine set's manifest.

    Raises:
        GoldenMissingError: There is none.
        BundleError: It is malformed.
    """
    values = engines.manifest.golden
    if values is None:
        missing = _missing(engines)
        why = missing.text("reason") if missing is not None else "the exporter stored none"
        raise GoldenMissingError(f"the bundle has no golden answer: {why}")
    document = _document(engines, values, "golden")
    return GoldenAnswer(
        request=_request(document),
        output_ids=document.integers("output_ids"),
        denoiser_calls=document.integer("denoiser_calls"),
        computed_with=document.text("computed_with"),
    )


def golden_request(engines: EngineSet) -> Request:
    """Return the request of the self-test, whether or not its answer is known.

    Raises:
        BundleError: The manifest has none.
    """
    if engines.manifest.golden is not None:
        return golden_answer(engines).request
    missing = _missing(engines)
    if missing is None:
        raise BundleError(
            f"{engines.folder / MANIFEST_FILE}: has no golden request; export the checkpoint again"
        )
    return _request(missing.section("request"))


def judge(golden: GoldenAnswer, result: Result, precision: str) -> SelfTestResult:
    """Compare an answer with the golden one, and name the failure."""
    ids = result.output_ids[len(golden.request.prompt_ids) :]
    expected, calls = golden.output_ids, result.denoiser_calls
    equal = _equal_at_first(ids, expected)

    def outcome(status: Status, reason: str) -> SelfTestResult:
        return SelfTestResult(
            status, reason, equal, len(ids), calls, golden.denoiser_calls, result.seconds
        )

    counts = f"{calls} denoiser calls for {len(ids)} tokens, {golden.denoiser_calls} were expected"
    late = (
        f"the first {equal} of {len(expected)} tokens are those of {golden.computed_with}, "
        f"then they differ; {counts}"
    )
    exact = precision == EXACT_PRECISION
    if ids == expected and (calls == golden.denoiser_calls or not exact):
        return outcome("passed", f"{len(ids)} tokens as expected, {counts}")
    if ids == expected:
        return outcome("failed", f"the tokens are right, but not the number of calls: {counts}")
    if calls == len(ids) > golden.denoiser_calls:
        return outcome(
            "failed",
            f"word salad: exactly one token per denoiser call, and tokens differ from number "
            f"{equal + 1} on ({counts}). The denoiser does not see its context: check the Mamba "
            "seeds and the kernels of this build with `twotower verify`",
        )
    if equal < golden.request.block_size // 2 or calls > CALLS_FACTOR * golden.denoiser_calls:
        return outcome(
            "failed",
            f"a wrong answer: tokens differ from number {equal + 1} of {len(expected)} on; "
            f"{counts}. `twotower verify --layers` shows which layer computes something else",
        )
    if exact:
        return outcome(
            "failed", f"numerics: {late}. `twotower verify --layers` shows where it starts"
        )
    return outcome("deviates", f"numerics of {precision} engines: {late}")


def _equal_at_first(ids: Sequence[int], expected: Sequence[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    pairs = zip(ids, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(expected)))


def _missing(engines: EngineSet) -> Document | None:
    """Return what the manifest says in place of a golden answer."""
    values = engines.manifest.golden_missing
    return None if values is None else _document(engines, values, "golden_missing")


def _document(engines: EngineSet, values: dict[str, Any], name: str) -> Document:
    remedy = "export the checkpoint again"
    return Document(values, str(engines.folder / MANIFEST_FILE), BundleError, remedy, name)


def _request(document: Document) -> Request:
    mode = document.text("mode")
    if mode not in ("mask_diffusion", "ar"):
        raise document.refusal(f"the field `{document.name_of('mode')}` is {mode!r}")
    return Request(
        request_id="golden",
        prompt_ids=document.integers("prompt_ids"),
        mode="ar" if mode == "ar" else "mask_diffusion",
        max_new_tokens=document.integer("max_new_tokens"),
        block_size=document.integer("block_size"),
        steps=document.integer("steps"),
        threshold=document.number("threshold"),
        ignore_eos=True,  # the golden answer was computed to its full length
    )
