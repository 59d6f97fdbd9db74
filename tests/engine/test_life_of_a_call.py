"""What one call passes: the folders it goes through, and the objects that are handed on in it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from memwrap.memories.config import MemoryConfig
from memwrap.testing.helpers import ids, wrapped

TOUR = Path(__file__).resolve().parents[2] / "docs" / "architecture.md"
# These live longer than a call, or are settings of one.
SERVICES = {"Backbone", "Collect", "Rotary", "SegmentReader"}
# A call of one attention module, which `LayerAttention` holds.
PARTS = {"AttentionCall"}


def passed(memory: str) -> tuple[set[str], set[str]]:
    """Folders whose functions a call runs, and the names of classes whose objects functions of
    another file than the class's own are given."""
    model = wrapped(memory)
    folders: set[str] = set()
    carriers: set[str] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_globals.get("__name__", "")
        if event != "call" or not file.startswith("memwrap."):
            return
        folders.add(file.split(".")[1])
        for value in list(frame.f_locals.values()):
            kind = type(value)
            ours = kind.__module__.startswith("memwrap.") and kind.__module__ != file
            if ours and not isinstance(value, (torch.nn.Module, MemoryConfig)):
                carriers.add(kind.__name__)

    with torch.no_grad():
        model(ids(1, 20))
        sys.setprofile(watch)
        try:
            model(ids(1, 20))
        finally:
            sys.setprofile(None)
    return folders - {"testing"}, carriers - SERVICES - PARTS


@pytest.mark.parametrize("memory", ["rmt", "armt", "infini", "landmark", "hmt"])
def test_a_call_passes_few_rooms_and_carriers(memory: str) -> None:
    folders, carriers = passed(memory)
    assert len(folders) <= 9, sorted(folders)
    tour = TOUR.read_text(encoding="utf-8").partition("What is handed on has a name")[2]
    named = set(re.findall(r"`(\w+)`", tour.partition("\n\n")[0]))
    assert len(named) == 9
    # A memory that sees a segment's tokens is handed them where it closes.
    assert carriers - {"SegmentTokens"} <= named, sorted(carriers - named)
    assert {"Inputs", "Step", "StepInput", "MemoryState"} <= carriers  # a guard on this test
