"""In which dtype a model is quick on this machine's CPU."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SLOWER = 1.5
"""From here on float32 is taken."""
_TOKENS, _WIDTH, _TRIES = 64, 1024, 3


@cache
def slowness(dtype: torch.dtype) -> float:
    """Measure how many times longer than in float32 a product of matrices takes in `dtype` on the
    CPU. Measured once a process, in some hundredths of a second."""

    def seconds(of: torch.dtype) -> float:
        x, weight = torch.ones(_TOKENS, _WIDTH, dtype=of), torch.ones(_WIDTH, _WIDTH, dtype=of)
        times = []
        for _ in range(_TRIES):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(dtype) / max(seconds(torch.float32), 1e-9)


def quick_dtype(config: Any, *, keep: bool = False) -> torch.dtype | None:
    """Choose float32 for a model that is saved in a dtype which this machine, without an
    accelerator, computes much more slowly, and say so; None to leave it as it is saved.

    Args:
        config: the backbone's.
        keep: only say that another dtype would be quicker: states belong to a dtype, and those of a
            saved memory model are read by other programs too.
    """
    saved = getattr(config, "dtype", None)
    saved = getattr(torch, saved, None) if isinstance(saved, str) else saved
    half = saved in (torch.bfloat16, torch.float16)
    quantised = getattr(config, "quantization_config", None) is not None
    if not half or quantised or torch.accelerator.is_available():
        return None
    times = slowness(saved)
    if times < SLOWER:
        return None
    name = str(saved).removeprefix("torch.")
    slow = f"{name} takes {times:.1f} times as long as float32 on this CPU"
    if keep:
        logger.warning_once(f"{slow}: --dtype float32 would be quicker, with states of its own.")
        return None
    logger.warning_once(
        f"{slow}: the model is loaded in float32, with twice the memory (--dtype {name}: as saved)."
    )
    return torch.float32


__all__ = ["quick_dtype", "slowness"]
