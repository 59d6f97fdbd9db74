"""Checks of what a state file holds, whatever the model: layout, counters, numbers."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COUNTERS = ("fill", "segments", "tokens_seen")
COLUMNS = ("positions", "valid", "tokens")  # of an open segment
_ROWS = {*COUNTERS, *(f"open_{n}" for n in COLUMNS), "ids_hash", "mask_hash", "answer_from"}
_KINDS = ("open", "memories", "rows")
_MOST_DEPTH = 16
_MOST = 2**53
_MOST_TENSORS = 2**18


def check_layout(about: Any, tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse names, types and shapes that no state has.

    Args:
        about: the file's description.
        tensors: all tensors by name.
        path: the file, for errors.

    Raises:
        ValueError: names what is wrong.
    """
    types = {"columns": int, "noted": bool, "hold_open": bool, "signature": dict, "memories": dict}
    for name, wanted in types.items():
        if not isinstance(about, dict) or type(about.get(name)) is not wanted:
            raise _damaged(path, f"its `{name}` is no {wanted.__name__}")
    signature, weights = about["signature"], about.get("weights")
    memories = signature.get("memories", [])
    good = isinstance(memories, list) and isinstance(signature.get("backbone", {}), dict)
    good = good and all(isinstance(m, dict) and isinstance(m.get("name"), str) for m in memories)
    good = good and isinstance(signature.get("adapters", []), list)
    if not good or not (weights is None or isinstance(weights, dict)):
        raise _damaged(path, "its signature or weights cannot be read")
    if not (about["chat"] is None or isinstance(about["chat"], dict)):
        raise _damaged(path, "its chat cannot be read")
    fill = tensors.get("rows.fill")
    batch = len(fill) if fill is not None and fill.dim() else 0
    if not batch:
        raise _damaged(path, "it has no rows")
    for name, tensor in tensors.items():
        kind, *inner = name.split(".")
        known = kind in _KINDS and 0 < len(inner) <= _MOST_DEPTH
        if not known or (kind == "rows" and (len(inner) > 1 or inner[0] not in _ROWS)):
            raise _damaged(path, f"it holds the foreign tensor {name[:80]}")
        if tensor.dim() < 1 or tensor.shape[0] != batch:
            raise _damaged(path, f"{name[:80]} has shape {tuple(tensor.shape)} for {batch} rows")
    check_finite(tensors, f"{path} is damaged: it", "read the text again.")


def check_finite(tensors: dict[str, Tensor], source: str, advice: str) -> None:
    """Refuse numbers that are not finite; names the first tensor that has any."""
    for name, tensor in tensors.items():
        wide = tensor.is_floating_point() and tensor.element_size() > 1  # no 8-bit codes
        if wide and tensor.device.type != "meta" and not bool(tensor.isfinite().all()):
            raise ValueError(f"{source} holds numbers in {name[:80]} that are not finite; {advice}")


def check_count(names: Sized, path: Path) -> None:
    """Refuse more tensors than any state has, before they are read one by one."""
    if len(names) > _MOST_TENSORS:
        raise _damaged(path, f"it holds {len(names):,} tensors")


def counts_padding(state: Any) -> bool:
    """Tell whether padding fills segments of a state, as it is said in its signature."""
    return any(m.get("count_padding") for m in state.signature.get("memories", []))


def check_rows(state: Any, path: Path) -> None:
    """Refuse counters that no reading gives, and an open segment that does not fit them.

    Raises:
        ValueError: names what is wrong.
    """
    batch = state.batch_size
    positions, valid, tokens = (getattr(state.open, name) for name in COLUMNS)
    wanted = {name: ((batch,), torch.long) for name in (*COUNTERS, "mask_hash")}
    for name, (shape, dtype) in wanted.items():
        tensor = getattr(state, name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise _damaged(path, f"its {name} is {tensor.dtype} {tuple(tensor.shape)}")
    for name in ("ids_hash", "answer_from"):
        tensor = getattr(state, name)
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != ((batch,), torch.long):
            raise _damaged(path, f"its {name} is none")
    if state.answer_from is not None and int(state.answer_from.min()) < 0:
        raise _damaged(path, "its answers begin before the text")
    if positions.dtype != torch.long or valid.dtype != torch.bool or valid.dim() != 2:
        raise _damaged(path, "its open segment has no positions")
    if not positions.shape == valid.shape == tokens.shape or tokens.dtype != torch.long:
        raise _damaged(path, "its open segment has positions of another length")
    fill, segments, seen = (getattr(state, name) for name in COUNTERS)
    counts = torch.stack([fill, segments, seen])
    if batch and (int(counts.min()) < 0 or int(counts.max()) > _MOST):
        raise _damaged(path, "a counter is out of range")
    most = int(seen.max()) if batch else 0
    # Where padding fills segments, segments and `fill` count it.
    columns = counts_padding(state)
    closed = (state.columns if columns else seen) - fill
    if bool((segments > closed).any()) or not most <= state.columns <= _MOST:
        raise _damaged(path, "its counters contradict each other")
    open_tokens = valid.sum(1)
    waits = bool(((open_tokens > 0) & (fill == 0)).any())
    if waits or (not columns and bool((open_tokens < fill).any())):
        raise _damaged(path, "its open segment has not the tokens that it counts")
    if valid.numel() and not torch.equal((tokens * valid).amax(1).clamp_min(0), fill):
        raise _damaged(path, "its open segment has not the tokens that it counts")
    if valid.numel() and not 0 <= int(positions.min()) <= int(positions.max()) <= _MOST:
        raise _damaged(path, "its open segment has positions out of range")
    if not columns and not torch.equal(positions[valid], (valid.cumsum(1) - 1)[valid]):
        raise _damaged(path, "its open segment has positions with gaps")


def _damaged(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path} is damaged: {fault}. Read the text again.")
