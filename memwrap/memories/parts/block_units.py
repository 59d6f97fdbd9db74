"""Units of a store, laid out as the keys and values that queries attend to.

Shapes: B rows, Hkv KV heads, U units of b tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memwrap.backbones import LayerAttention
from memwrap.ops.buffers import take as take_rows
from memwrap.ops.buffers.kept import kept_beside
from memwrap.ops.buffers.paged import Pages, SlotCache, take
from memwrap.ops.buffers.right_aligned import latest, right_valid
from memwrap.state.trees import RECENT, Tree

HELD = ("key", "value")
UNITS_A_PAGE = 16


def take_blocks(
    pages: Pages, units: Tensor, cache: SlotCache | None = None
) -> tuple[Tensor, Tensor]:
    """Take keys and values `(B, U, Hkv, b, D)` of `units` `(B, U)`; what is in the host's memory
    through a `cache` on the device of `units`."""
    batch, most = units.shape
    if not most:
        key, value = (pages["0"][n][:, :0] for n in HELD)
        return key.to(units.device), value.to(units.device)
    rows = [row for row in range(batch) for _ in range(most)]
    numbers = units.flatten().tolist()
    if cache is not None:
        taken = cache.take(pages, HELD, rows, numbers, UNITS_A_PAGE, units.device)
    else:
        taken = take(pages, HELD, rows, numbers, UNITS_A_PAGE)
    key, value = (t.unflatten(0, (batch, most)) for t in taken)
    return key, value


def side_by_side(blocks: Tensor) -> Tensor:
    """Lay blocks `(B, U, Hkv, b, D)` one behind the other, `(B, Hkv, U b, D)`."""
    return blocks.transpose(1, 2).flatten(2, 3)


def counts_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Count the units that were `chosen` `(B, 1, U)`, numbers from 1: those that ascend from the
    first on, and all that are not 0. Both are one number where zeros stand behind the units."""
    before = torch.nn.functional.pad(chosen, (1, 0))[..., :-1]
    return (chosen > before).long().cumprod(2).sum((1, 2)), (chosen > 0).sum((1, 2))


def first_length(pages: Pages, like: Tensor, size: int) -> tuple[Tensor, int, int]:
    """Give the length of a store's first page, once for each row of `like` `(B,)`, and the least
    and the most that it may be: `size` where another page follows."""
    length = next(iter(pages["0"].values())).shape[1]
    return torch.full_like(like, length), size if len(pages) > 1 else 0, size


def chosen_units(
    pages: Pages, chosen: Tensor, index: Tensor, cache: SlotCache | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Take keys and values `(B, Hkv, U b, D)` of units that were `chosen` `(B, 1, U)` before,
    numbers from 1, 0 for none, and tell which query of `index` `(B, T)` sees which; gathered once
    while the choice stands."""

    def gathered() -> tuple[Tensor, Tensor, Tensor]:
        taken = chosen > 0
        most = int(taken.sum(2).max()) if len(chosen) else 0
        units = (chosen[:, 0, :most] - 1).clamp_min(0)
        key, value = (side_by_side(x) for x in take_blocks(pages, units, cache))
        return key, value, taken[..., :most].repeat_interleave(pages["0"]["key"].shape[3], 2)

    key, value, shown = gathered() if cache is not None else kept_beside(chosen, "units", gathered)
    return key, value, shown.expand(-1, index.shape[1], -1)


def behind(units: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Put others behind units, each keys, values and who sees them `(B, T, N)`; keys and values are
    kept for as long as the same units have the same behind them."""

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        key, value = (torch.cat(pair, 2) for pair in zip(units[:2], others[:2], strict=True))
        return key, value, others[0]

    key, value, before = kept_beside(units[0], "behind", joined)
    if before is not others[0]:
        key, value, _ = joined()
    return key, value, torch.cat([units[2], others[2]], 2)


def kept_rows(pool: dict[str, Tensor], left: Tensor, count: Tensor, size: int) -> dict[str, Tensor]:
    """Take the `count` `(B,)` rows of a pool that are `left` `(B, N)`, at the right end of buffers
    of `size` rows."""
    index, valid = latest(left, size), right_valid(count, size)
    return {n: take_rows(x, index, valid) for n, x in pool.items()}


def blocks_of(pool: dict[str, Tensor], first: Tensor, more: Tensor, size: int) -> dict[str, Tensor]:
    """Cut the rows of a pool `(B, Hkv, N, D)` from `first` `(B,)` on into blocks of `size` rows,
    `(B, U, Hkv, size, D)`, as many as the row of the batch needs that needs most (`more`)."""
    most = int(more.max())
    index = first[:, None] + torch.arange(most * size, device=first.device)
    index = index.clamp_max(pool["key"].shape[2] - 1)
    return {
        name: take_rows(rows, index).unflatten(2, (most, size)).transpose(1, 2)
        for name, rows in pool.items()
    }


def add_received(attention: LayerAttention, state: Tree, received: Tensor, window: int) -> Tree:
    """Add what recent and own columns received, `(B, H, R + K)`, to the scores of a layer's state:
    of recent tokens, and by position of the first `window` of the open segment."""
    count = received.shape[2] - attention.value.shape[2]
    recent, segment = received[..., :count], received[..., count:]
    score = state[RECENT]["score"]
    old = score.shape[2] - count
    score = torch.cat([score[..., :old], score[..., old:] + recent], 2)
    inside = (attention.key_positions < window) & attention.key_valid
    index = attention.key_positions.clamp(0, window - 1)[:, None].expand_as(segment)
    segment = segment * inside[:, None]
    recent_rows = {**state[RECENT], "score": score}
    return {RECENT: recent_rows, "open_score": state["open_score"].scatter_add(2, index, segment)}


def scores_of_segment(attention: LayerAttention, scores: Tensor) -> Tensor:
    """Take the scores of a segment's columns, `(B, H, K)`, by their positions, from those of its
    first positions `(B, H, N)`; 0 for later ones."""
    size, positions = scores.shape[2], attention.key_positions
    if attention.positions.ordered and positions.shape[1] <= size:
        return scores[..., : positions.shape[1]]
    place = positions.clamp(0, size - 1)[:, None].expand(-1, scores.shape[1], -1)
    return scores.gather(2, place) * (positions < size)[:, None]
