"""The buffer that drops what was not used for longest, against lists."""

from __future__ import annotations

import torch

from memwrap.ops.buffers import least_used


def written_by_hand(
    rows: list[list[float]], used: list[int], count: int, new: list[float], size: int
) -> tuple[list[float], list[int], int]:
    """One row of the batch: entries and when each was used last, after `new` are written."""
    entries = list(zip(*rows, used, strict=True)) if rows else []
    keep = max(0, size - len(new))
    if count + len(new) > size:
        order = sorted(range(len(entries)), key=lambda i: (entries[i][1], i))
        gone = set(order[: max(0, len(entries) - keep)])
        entries = [e for i, e in enumerate(entries) if i not in gone]
    total = count + len(new)
    entries += [(value, total) for value in new[-size:]]
    return [e[0] for e in entries], [e[1] for e in entries], total


def test_the_least_used_entries_go() -> None:
    """Against lists: rows that fit and rows that do not, ties, padding, more rows than places."""
    size, rows = 5, 3
    generator = torch.Generator().manual_seed(3)
    buffer, last_used = torch.zeros(rows, 1, 0, 1), torch.full((rows, size), -1)
    count = torch.zeros(rows, dtype=torch.long)
    plain: list[tuple[list[float], list[int], int]] = [([], [], 0)] * rows
    for step in range(12):
        length = 7 if step == 8 else 3
        valid = torch.rand(rows, length, generator=generator) < 0.7
        new = torch.randn(rows, length, generator=generator)
        place = torch.randint(0, size, (rows, 2, 1), generator=generator)
        there = place < count.clamp_max(size)[:, None, None]
        last_used = least_used.mark(last_used, place, there, count)
        for b, (entries, used, total) in enumerate(plain):
            for n in place[b, :, 0].tolist():
                if n < len(used):
                    used = [total if i == n else u for i, u in enumerate(used)]
            plain[b] = written_by_hand([entries], used, total, new[b][valid[b]].tolist(), size)
        old, at, last_used = least_used.replace(last_used, count, valid)
        count = count + valid.sum(1)
        capacity = max(buffer.shape[2], min(size, int(count.max())))
        buffer = least_used.store(buffer, old, at, new[:, None, :, None], capacity)
        for b, (entries, used, total) in enumerate(plain):
            assert buffer[b, 0, : len(entries), 0].tolist() == entries
            assert last_used[b, : len(used)].tolist() == used
            assert count[b] == total and (last_used[b, len(used) :] == -1).all()
