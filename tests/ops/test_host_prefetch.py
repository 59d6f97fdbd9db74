"""Fetches that run one ahead of their use, and the small stores they bring."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memwrap.ops import landmark
from memwrap.ops.buffers import host_prefetch


def test_each_is_started_before_the_one_in_front_is_used() -> None:
    log: list[str] = []

    def fetch(n: int) -> tuple[torch.Tensor]:
        log.append(f"fetch {n}")
        return (torch.tensor(n),)

    device = torch.device("cpu")
    for (got,) in host_prefetch.prefetch([lambda n=n: fetch(n) for n in range(3)], device):  # type: ignore[misc]
        log.append(f"use {int(got)}")
    assert log == ["fetch 0", "fetch 1", "use 0", "fetch 2", "use 1", "use 2"]
    assert list(host_prefetch.prefetch([], device)) == []


def test_on_a_gpu_a_stream_of_its_own_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to CUDA in their order, with streams that only write down what they are asked."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            log.append(f"{self.name} marks")
            return "mark"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

        def __enter__(self) -> None:
            log.append(f"on {self.name}")

        def __exit__(self, *what: Any) -> None:
            log.append(f"off {self.name}")

    class Result:
        def record_stream(self, stream: Stream) -> None:
            log.append(f"result is used by {stream.name}")

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(host_prefetch, "_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    results = host_prefetch.prefetch([lambda: (Result(),)] * 2, torch.device("cuda"))  # type: ignore
    next(results)
    started = ["on side", "side marks", "off side"]
    given = ["main waits for mark", "result is used by main"]
    assert log == ["side waits for main", *started, *started, *given]
    next(results)
    assert log[-2:] == given and len(log) == 11


def test_a_small_store_holds_what_was_chosen() -> None:
    g = torch.Generator().manual_seed(0)
    keys, marks = torch.randn(2, 7, 3, 4, generator=g), torch.randn(2, 7, 4, generator=g)
    valid = torch.rand(2, 7, 3, generator=g) > 0.3
    ids = torch.tensor([[[[1, 5], [5, 7]]], [[[0, 7], [7, 7]]]])  # 7: none
    new, here, near, got = landmark.used_blocks(ids, valid, marks, keys)
    assert new.tolist() == [[[[0, 1], [1, 2]]], [[[0, 2], [2, 2]]]] and got.shape[1] == 2
    for row, blocks in ((0, [1, 5]), (1, [0])):
        for n, block in enumerate(blocks):
            assert torch.equal(got[row, n], keys[row, block])
            assert torch.equal(near[row, n], marks[row, block])
            assert torch.equal(here[row, n], valid[row, block])
    nothing = landmark.used_blocks(torch.full((2, 1, 1, 2), 7), valid, marks, keys)
    assert nothing[0].tolist() == [[[[1, 1]]], [[[1, 1]]]] and nothing[3].shape[1] == 1
