"""All segments in one launch a pass: launches, what is kept, which path is taken, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compare import DEVICE, draw, results
from torch import Tensor

import memwrap_kernels
from memwrap.ops import backend, infini
from memwrap_kernels import infini_kernels, infini_scan, infini_scan_kernels


def leaves(batch: int = 1) -> list[Tensor]:
    """2 query heads on 1 memory, 5 tokens, 5 channels of keys, 40 of values: two programs."""
    return [
        draw(batch, 2, 5, 5, seed=1), draw(batch, 1, 5, 5, seed=2), draw(batch, 1, 5, 40, seed=3),
        draw(batch, 1, 5, 40, seed=4), draw(batch, 1, 5, seed=5).abs(),
    ]  # fmt: skip


def run(*x: Tensor, update: str = "delta") -> Any:
    return infini.scan(*x, 3, update=update)


class Counted:
    """A kernel that notes its name where it is launched."""

    def __init__(self, kernel: Any, name: str, launched: list[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: Any) -> Any:
        self.launched.append(self.name)
        return self.kernel[grid]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for module in (infini_kernels, infini_scan_kernels):
        for name in [n for n in vars(module) if n.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name, names))
    return names


@pytest.mark.parametrize("update", infini.UPDATES)
def test_one_launch_a_pass(
    update: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infini_scan, "path", "fused")
    own = [x.requires_grad_() for x in leaves()]
    with backend("triton"):
        outputs = run(*own, update=update)
    assert launched == ["scan_kernel"]
    sum(x.sum() for x in outputs).backward()
    assert launched == ["scan_kernel", "scan_bwd_kernel"]
    monkeypatch.setattr(infini_scan, "path", "launches")
    launched.clear()
    with backend("triton"):
        run(*own, update=update)
    assert len(launched) == (4 if update == "delta" else 3) and "scan_kernel" not in launched


def test_memories_are_kept_for_a_backward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients nothing is stored for every segment, and the results are the same."""
    monkeypatch.setattr(infini_scan, "path", "fused")
    seen: list[torch.Size] = []

    def noted(*x: Any) -> Any:
        found = infini_scan_fused(*x)
        seen.append(found[3].shape)
        return found

    infini_scan_fused = infini_scan.fused
    monkeypatch.setattr(infini_scan, "fused", noted)
    own = leaves()
    with backend("triton"):
        plain = run(*own)
        own[3].requires_grad_()
        kept = run(*own)
        with torch.no_grad():
            run(*own)
    assert [x[2] for x in seen] == [0, 2, 0]
    for a, b in zip(plain, kept, strict=True):
        assert torch.equal(a, b)
    given = [x.detach().requires_grad_() for x in own]
    out = infini_scan_fused(*given, None, 3, True, 1e-10, False)[0]
    with pytest.raises(RuntimeError, match="keep=False"):
        out.sum().backward()


def test_any_program_may_be_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of keys come from whichever program of a memory is last, and are the same bits.

    The interpreter runs programs one after the other, here in both orders; a GPU in its own.
    """
    from triton.runtime.interpreter import interpreter_builder as interpreter

    monkeypatch.setattr(infini_scan, "path", "fused")
    first = results("triton", run, *leaves())
    plain = interpreter.set_grid_idx
    turned: list[int] = []

    def set_grid_idx(x: int, y: int, z: int) -> None:
        turned.append(x)
        plain(interpreter.grid_dim[0] - 1 - x, y, z)

    monkeypatch.setattr(interpreter, "set_grid_idx", set_grid_idx)
    for a, b in zip(first, results("triton", run, *leaves()), strict=True):
        assert torch.equal(a, b)
    assert turned or DEVICE != "cpu"


@pytest.mark.parametrize("processors", [15, 16, 17])
def test_the_path_follows_the_number_of_programs(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 rows of 1 memory and 2 blocks of values are 16 programs."""
    monkeypatch.setattr(infini_scan, "multiprocessors", lambda device: processors)
    M = leaves(batch=8)[3]
    assert infini_scan.fuses(M, torch.bfloat16, True, True) == (processors <= 16)
    for path in ("fused", "launches"):
        monkeypatch.setattr(infini_scan, "path", path)
        assert infini_scan.fuses(M, torch.bfloat16, True, True) == (path == "fused")


def test_a_backward_that_spills_is_not_taken() -> None:
    """The delta rule's, above half of the largest head dim."""
    for dtype, limit in memwrap_kernels.MAX_HEAD_DIM.items():
        for keys, expected in ((limit // 2, True), (limit // 2 + 1, False)):
            M = torch.zeros(200, 1, keys, 1, device="meta")
            assert infini_scan.fuses(M, dtype, True, True) is expected
            assert infini_scan.fuses(M, dtype, False, True)
            assert infini_scan.fuses(M, dtype, True, False)


def test_long_texts_in_many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the first memory and of the first keys through 12 segments."""
    monkeypatch.setattr(infini_scan, "path", "fused")
    own = [
        draw(1, 1, 12, 2, seed=1), draw(1, 1, 12, 2, seed=2), draw(1, 1, 12, 3, seed=3),
        draw(1, 1, 2, 3, seed=4), draw(1, 1, 2, seed=5).abs(),
    ]  # fmt: skip

    def one_token_each(*x: Tensor) -> Any:
        return infini.scan(*x, 1, update="delta")

    got, want = (results(name, one_token_each, *own) for name in ("triton", "torch"))
    for a, b in zip(got, want, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())
