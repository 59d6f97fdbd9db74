"""Two jobs at a time, each on a model and on a half of the processor's threads of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class SideBySide:
    """Workers who share the threads: small matrices leave half of them idle in one job.

    Args:
        make: makes a model; each worker gets one, as a job may wrap it.

    Attributes:
        count: of workers: two, or one where there is one thread.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self.threads = torch.get_num_threads()
        self.count = min(2, self.threads)
        self.models: SimpleQueue[Any] = SimpleQueue()
        for _ in range(self.count):
            self.models.put(make())
        self.pool = ThreadPoolExecutor(self.count)

    def begin(self, job: Callable[[Any], T]) -> Future[T]:
        """Do a job, which is given a model, as soon as a worker is free."""
        return self.pool.submit(self._do, job)

    def _do(self, job: Callable[[Any], T]) -> T:
        torch.set_num_threads(self.threads // self.count)
        model = self.models.get()
        try:
            return job(model)
        finally:
            self.models.put(model)

    def end(self) -> None:
        """Wait for what was begun, and let what was not be."""
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)


__all__ = ["SideBySide"]
