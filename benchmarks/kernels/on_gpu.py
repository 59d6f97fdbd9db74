"""Every Triton kernel on a GPU: right against float64, timed against torch and the bytes floor.

python benchmarks/kernels/on_gpu.py [--quick]

For each shape, in one run: the kernels, the chunked torch version as it is and under
torch.compile, and the time that moving the inputs, outputs and states once would take at the
bandwidth that a large copy reaches on this GPU. The compressive memory is checked and timed both
ways, all in one launch a pass and in several, with the one that memwrap would take. Landmark
attention, gated linear attention and the delta rule stand beside SDPA, chunked torch and
flash-linear-attention instead. Writes `results/kernels_GPU.json`, and runs `stores_on_gpu.py`.
Without a GPU it says so and measures nothing.
"""

from __future__ import annotations

import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import attention_and_recurrences
import stores_on_gpu
from common import save

from memwrap.ops import associative, backend, infini
from memwrap_kernels import infini_scan

BATCHES, HEADS, WIDTHS = (1, 8), (8, 32), (64, 128)
LENGTHS = (8_192, 32_768, 131_072)
SEGMENT = 2_048
GROUP = 4  # query heads a memory
COMPILED_UP_TO = 32_768  # torch.compile unrolls the segments: longer ones take it minutes
ARMT = {"nu": 3, "width": 64, "tokens": 1_024, "memory_tokens": 16, "hidden": (1_024, 4_096)}
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of the largest value
Run = Callable[..., Sequence[Tensor]]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype).requires_grad_()


def infini_inputs(batch: int, heads: int, width: int, tokens: int, dtype: Any) -> list[Tensor]:
    own = heads // GROUP
    kept = torch.promote_types(dtype, torch.float32)
    return [
        draw(batch, heads, tokens, width, dtype=dtype),
        draw(batch, own, tokens, width, dtype=dtype),
        draw(batch, own, tokens, width, dtype=dtype),
        draw(batch, own, width, width, dtype=kept).detach(),
        draw(batch, own, width, dtype=kept).detach().abs(),
    ]


@contextmanager
def forced(path: str) -> Iterator[None]:
    """One way of the compressive memory's kernels: "fused" or "launches"."""
    before, infini_scan.path = infini_scan.path, path
    try:
        yield
    finally:
        infini_scan.path = before


def infini_run(update: str) -> Run:
    return lambda *x: infini.scan(*x, SEGMENT, update=update)  # type: ignore[misc]


def infini_ways(update: str) -> dict[str, Run]:
    """The kernels' two ways of the same."""

    def way(path: str) -> Run:
        def run(*x: Tensor) -> Sequence[Tensor]:
            with forced(path):
                return infini.scan(*x, SEGMENT, update=update)  # type: ignore[misc]

        return run

    return {f"triton, {path}": way(path) for path in infini_scan.PATHS if path != "auto"}


def armt_inputs(batch: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    features = 2 * ARMT["nu"] * ARMT["width"]  # type: ignore[operator]
    kept = torch.promote_types(dtype, torch.float32)
    tokens, memory, width = ARMT["tokens"], ARMT["memory_tokens"], ARMT["width"]
    return [
        draw(batch, 1, tokens, width, dtype=dtype),  # type: ignore[arg-type]
        draw(batch, 1, memory, width, dtype=dtype),  # type: ignore[arg-type]
        draw(batch, 1, memory, hidden, dtype=dtype),  # type: ignore[arg-type]
        torch.rand(batch, 1, memory, 1, device="cuda", dtype=kept),  # type: ignore[arg-type]
        draw(batch, 1, features, hidden, dtype=kept),
        draw(batch, 1, features, dtype=kept).detach().abs(),
    ]


def armt_run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, A: Tensor, z: Tensor) -> Any:
    written = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    out = associative.read_projected(q, A, z, nu=3, normalize=False)
    return out, *associative.write_projected(
        k, v, beta, A, z, written, nu=3, normalize=False
    )  # fmt: skip


def gradients(run: Run, inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of a fixed weighted sum."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    loss = sum((x * torch.linspace(-1, 1, x.shape[-1], device="cuda")).sum() for x in outputs)
    loss.backward()  # type: ignore[union-attr]
    # What a function does not use has no gradient.
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [x.detach() for x in outputs] + grads


def errors(run: Run, inputs: list[Tensor], dtype: torch.dtype) -> float:
    """Largest error of outputs and gradients against float64, over each one's largest value."""
    with backend("torch"):
        want = gradients(run, [x.detach().double() for x in inputs])
    with backend("triton"):
        got = gradients(run, inputs)
    return largest(got, want, dtype)


def against(run: Run, reference: Run, inputs: list[Tensor], dtype: torch.dtype) -> float:
    """`errors` of a function that has its own reference."""
    want = gradients(reference, [x.detach().double() for x in inputs])
    return largest(gradients(run, inputs), want, dtype)


def largest(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> float:
    worst = max(
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-6))
        for a, b in zip(got, want, strict=True)
    )
    if not worst <= LIMITS[dtype]:
        raise SystemExit(f"The kernels are wrong here: {worst:.1e} > {LIMITS[dtype]:.0e}.")
    return worst


def milliseconds(function: Callable[[], Any], repeats: int = 20) -> float | str:
    """Median GPU time; a line of text if it does not fit."""
    try:
        for _ in range(3):
            function()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return "out of memory"


def bytes_a_second() -> float:
    """What copying 1 GiB reaches, read and written bytes together."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    time = milliseconds(lambda: target.copy_(source))
    return 2 * source.nbytes / (float(time) / 1e3)


def timed(
    run: Run, inputs: list[Tensor], compiled: bool, bandwidth: float,
    ways: dict[str, Run] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Forward, and forward with backward, of every implementation; `ways`: those of the kernels."""
    with torch.no_grad(), backend("triton"):
        outputs = run(*inputs)
    moved = sum(x.nbytes for x in [*inputs, *outputs])
    del outputs
    found: dict[str, Any] = {"floor": {"forward": 1e3 * moved / bandwidth}}
    versions = {name: ("triton", way) for name, way in (ways or {"triton": run}).items()}
    versions["torch"] = ("torch", run)
    if compiled:
        torch._dynamo.reset()
        versions["torch.compile"] = ("torch", torch.compile(run))
    for name, (choice, function) in versions.items():

        def forward(function: Run = function) -> None:
            with torch.no_grad():
                function(*inputs)

        def both(function: Run = function) -> None:
            sum(x.float().sum() for x in function(*inputs)).backward()  # type: ignore[union-attr]

        with backend(choice):
            found[name] = {"forward": milliseconds(forward), "both": milliseconds(both)}
    return found


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks/kernels: no GPU was found, so the kernels are not measured here.")
        return
    quick = "--quick" in sys.argv
    bandwidth = bytes_a_second()
    result: dict[str, Any] = {
        "bytes_per_second": bandwidth, "segment_size": SEGMENT, "query_heads_per_memory": GROUP,
        "unit": "milliseconds", "errors_against_float64": {}, "infini": {}, "armt": {},
    }  # fmt: skip
    wrong = result["errors_against_float64"]
    for dtype, update in itertools.product(LIMITS, infini.UPDATES):
        for width in WIDTHS:
            own = infini_inputs(2, 8, width, 3 * SEGMENT + 77, dtype)
            for way, run in infini_ways(update).items():
                wrong[f"infini {update} {dtype} {width}, {way}"] = errors(run, own, dtype)
    for dtype in LIMITS:
        wrong[f"armt {dtype}"] = errors(armt_run, armt_inputs(2, 512, dtype), dtype)
    shapes = list(itertools.product(BATCHES, HEADS, WIDTHS, LENGTHS))
    for batch, heads, width, tokens in shapes[:2] if quick else shapes:
        own = infini_inputs(batch, heads, width, tokens, torch.bfloat16)
        name = f"batch {batch}, {heads} heads, head dim {width}, {tokens} tokens"
        result["infini"][name] = {
            update: timed(
                infini_run(update), own, tokens <= COMPILED_UP_TO, bandwidth, infini_ways(update)
            )
            for update in infini.UPDATES
        }
        fuses = infini_scan.fuses(own[3], torch.bfloat16, True, True)
        result["infini"][name]["taken"] = "fused" if fuses else "launches"
        del own
        torch.cuda.empty_cache()
    for batch, hidden in itertools.product(BATCHES, ARMT["hidden"]):  # type: ignore[call-overload]
        name = f"batch {batch}, hidden size {hidden}, one segment"
        own = armt_inputs(batch, hidden, torch.bfloat16)
        result["armt"][name] = timed(armt_run, own, True, bandwidth)
    wrong |= attention_and_recurrences.checked(against, list(LIMITS))
    result |= attention_and_recurrences.timed(milliseconds, quick)
    gpu = re.sub(r"\W+", "_", torch.cuda.get_device_name()).strip("_")
    save(f"kernels_{gpu}", result)
    stores_on_gpu.main()


if __name__ == "__main__":
    main()
