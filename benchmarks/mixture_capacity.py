"""What several small states hold that are chosen by a router, beside one of the same bytes.

python benchmarks/mixture_capacity.py

Pairs of random unit keys and random values of width 32 are written by the delta rule (beta 1), then
every key is asked for its value; right is one whose own value is the nearest. Routers are random
and see the key, in both passes. Results go to results/mixture_capacity.json and the page of Liger.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch
from common import save
from pages import load, put, table
from torch import Tensor

from memwrap.ops import delta
from memwrap.ops.mixture import Routing

WIDTH, PAIRS, TRIALS = 32, (32, 64, 128, 256), 32


class Store(NamedTuple):
    """States of `keys` by 32 numbers, of which `top_k` are chosen; `drawn`: the key's width, which
    random features bring to `keys`."""

    said: str
    memories: int
    top_k: int
    keys: int
    drawn: int

    @property
    def bytes(self) -> int:
        return 4 * self.memories * self.keys * WIDTH


STORES = (
    Store("one state", 1, 1, WIDTH, WIDTH),
    Store("four states, keys of 8 channels, one chosen", 4, 1, 8, 8),
    Store("four states, one chosen", 4, 1, WIDTH, WIDTH),
    Store("four states, two chosen", 4, 2, WIDTH, WIDTH),
    Store("one state, keys of 128 channels", 1, 1, 4 * WIDTH, 4 * WIDTH),
    Store("one state, 128 random ReLU features of keys of 32 channels", 1, 1, 4 * WIDTH, WIDTH),
)


def recalled(store: Store, pairs: int, seed: int) -> float:
    """The share of values that are found again."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    keys, values = normal(pairs, store.drawn), normal(pairs, WIDTH)
    keys = keys / keys.norm(dim=-1, keepdim=True)
    routing = Routing.of((keys @ normal(store.drawn, store.memories))[None], store.top_k)
    if store.keys != store.drawn:
        keys = (keys @ normal(store.drawn, store.keys)).relu()
    k, v = (x.expand(store.memories, 1, -1, -1) for x in (keys, values))
    mask = routing.mask(torch.ones(1, pairs, dtype=torch.bool), shared=False)
    _, state = delta.scan(k, k, v, torch.ones(k.shape[:3]), l2norm=True, mask=mask)
    read = delta.unit(keys) @ state
    got = routing.mixed(read[None])[0, 0]
    nearest = torch.cdist(got, values).argmin(-1)
    return float((nearest == torch.arange(pairs)).float().mean())


def main() -> None:
    found: dict[str, Any] = {}
    for store in STORES:
        shares = {n: [recalled(store, n, seed) for seed in range(TRIALS)] for n in PAIRS}
        found[store.said] = {"bytes": store.bytes, "shares": {
            n: {"mean": statistics.mean(s), "error": statistics.stdev(s) / TRIALS**0.5}
            for n, s in shares.items()
        }}  # fmt: skip
    save("mixture_capacity", {"trials": TRIALS, "stores": found})
    rows = [["float32 state", "bytes", *(f"{n} pairs" for n in PAIRS)]]
    for said, own in load("mixture_capacity")["stores"].items():
        cells = [f"{100 * s['mean']:.0f} ± {100 * s['error']:.1f}" for s in own["shares"].values()]
        rows.append([said, f"{own['bytes']:,}", *cells])
    put("methods/liger.md", "mixture", (
        f"Percent of values found, mean and standard error of {TRIALS} draws (seeds 0 to "
        f"{TRIALS - 1}), keys and values of 32 channels where nothing else is said "
        f"(`python benchmarks/mixture_capacity.py`):\n\n{table(rows)}"
    ))  # fmt: skip


if __name__ == "__main__":
    main()
