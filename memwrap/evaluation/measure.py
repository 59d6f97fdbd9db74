"""How much memory something took, and on what machine."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

PROC = Path("/proc/self")


@dataclass
class Peak:
    """Most bytes in use while a block ran; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak of tensors on a GPU, or of this process's resident memory (Linux)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    known = _reset()
    yield peak
    if known:
        peak.bytes = _resident_peak()


@dataclass
class Costs:
    """Time and memory by what was measured.

    Attributes:
        seconds: sums.
        peak_bytes: the most; None where the system does not tell.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str, device: torch.device) -> Iterator[None]:
        """Add what the block takes to `name`."""
        start = time.perf_counter()
        with peak_memory(device) as peak:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        known = self.peak_bytes.get(name)
        self.peak_bytes[name] = None if peak.bytes is None else max(peak.bytes, known or 0)


def _reset() -> bool:
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int | None:
    match = re.search(r"^VmHWM:\s*(\d+) kB", (PROC / "status").read_text(), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def machine() -> dict[str, Any]:
    """Describe where figures were measured: processor, GPU, versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor()),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
