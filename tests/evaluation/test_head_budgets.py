"""Shares of slots by head: they go where they take most of the error away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import refused

import memwrap
from memwrap.evaluation.head_budgets import head_budgets, shares_of
from memwrap.testing.families import build
from memwrap.testing.helpers import ids


def test_slots_go_where_they_help() -> None:
    errors = {"L0H0": [0.8, 0.4, 0.1], "L0H1": [0.2, 0.19, 0.18], "L1H0": [0.5, 0.3, 0.35]}
    shares = shares_of(errors, [1, 2, 4], 2)
    # 6 slots: one each; then L0H0 (0.4 a slot), L1H0 (0.2), L0H0 again (0.15).
    assert shares == {"L0H0": 3 / 6, "L0H1": 1 / 6, "L1H0": 2 / 6}


def test_measured_shares_are_a_setting(tmp_path: Path) -> None:
    base, rows = build("llama"), list(ids(2, 60))
    settings = {"segment_size": 8, "memory_size": None, "num_sinks": 2, "reference_every": 1}
    model = memwrap.wrap(base, "compact", **settings, slots=6)
    found = head_budgets(model, rows)
    assert found.sizes == [1, 3, 6, 12, 24] and found.documents == 2
    assert sum(found.shares.values()) == pytest.approx(1.0)
    # More slots lose less: by far, from the fewest to the most.
    assert all(errors[-1] < 0.7 * errors[0] for errors in found.errors.values()), found.errors
    state = model.read(rows[0][None])
    kept = model.compaction_errors(state, 58)  # all of it
    assert all(float(error.max()) < 1e-10 for error in kept.values()), kept
    found.save(tmp_path / "budgets.json")
    shares = json.loads((tmp_path / "budgets.json").read_text())["shares"]
    with refused("at least 27"):
        head_budgets(model, [rows[0][:20]])
    memwrap.unwrap(model)
    model = memwrap.wrap(base, "compact", **settings, slots=6, budgets=shares)
    small = model.compact(model.read(rows[0][None]), 6)
    trees = small.memories["compact"]["layers"]
    counts = {f"L{n}H{h}": int(trees[n]["slot_count"][0, h]) for n in "01" for h in (0, 1)}
    assert counts == {name: round(24 * share) for name, share in shares.items()}
    memwrap.unwrap(model)
    with refused("memory_size=null"):
        head_budgets(memwrap.wrap(base, "compact", segment_size=8), rows)
