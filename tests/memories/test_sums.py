"""Decay and cap of summed states against plain statements in float64."""

from __future__ import annotations

import math

import pytest
import torch

from memwrap.memories.parts.sums import SummedConfig
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, assert_close, ids, wrapped


def capped_naively(read: torch.Tensor, beside: torch.Tensor, cap: float) -> torch.Tensor:
    """A token after the other, by the words of the setting."""
    out = read.clone()
    for row, other in zip(out.flatten(0, -2), beside.flatten(0, -2), strict=True):
        size = math.sqrt(sum(float(x) ** 2 for x in row[: len(other)]))
        most = cap * math.sqrt(sum(float(x) ** 2 for x in other))
        if size > most:
            row.mul_(most / size)
    return out


def test_the_cap_is_that_of_its_words() -> None:
    torch.manual_seed(0)
    read = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    beside = torch.randn(2, 3, 4, 5, dtype=torch.float64)  # one column is scaled along
    read[0, 0], read[1, 1, 2], beside[1, 2, 0] = read[0, 0] * 1e-3, 0.0, 0.0
    got = SummedConfig(read_cap=0.7).capped(read, beside)
    want = capped_naively(read, beside, 0.7)
    assert_close(got, want, 1e-11)
    assert torch.equal(got[0, 0], read[0, 0]) and not torch.allclose(got, read)
    assert SummedConfig().capped(read, beside) is read


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.1])
def test_a_decayed_sum_is_geometric(decay: float) -> None:
    """In the lowest layer what a segment adds is the same whatever was read before."""
    base = build("llama").double()
    model = wrapped("infini", base=base, layers=[0], state_decay=decay)
    text = ids(1, 4 * SEGMENT)
    parts = [model.read(part).memories["infini"]["layers"]["0"] for part in text.split(SEGMENT, 1)]
    state = model.read(text)
    for name in ("M", "z"):
        want = sum(decay ** (3 - n) * part[name] for n, part in enumerate(parts))
        assert_close(state.memories["infini"]["layers"]["0"][name], want, 1e-10, name)
    tree = state.memories["infini"]["layers"]["0"]
    by_head = [
        math.sqrt(float(tree["M"][0, h].square().sum() + tree["z"][0, h].square().sum()))
        for h in range(tree["M"].shape[1])
    ]
    assert float(model.state_norms(state)["infini"][0]) == pytest.approx(max(by_head), 1e-10)


def test_fast_weights_decay_to_those_they_began_with() -> None:
    """A segment then makes one step from the beginning, whatever stood before it."""
    text = ids(1, 4 * SEGMENT)
    model = wrapped("lact", momentum=False, layers=[0], state_decay=1e-6)
    states = (model.read(part).memories["lact"] for part in (text, text[:, -SEGMENT:]))
    tree, alone = (state["layers"]["0"] for state in states)
    for name, first in model.memories["lact"].sums_before(0).items():
        if name in tree:
            assert_close(tree[name], alone[name], 1e-4, name)
            assert float((tree[name] - first).detach().norm()) > 1e-3
    assert {"w0", "w1", "w2"} <= tree.keys()
