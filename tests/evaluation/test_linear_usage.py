"""What the branches of a linearized model are worth: curves against direct computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import memwrap
from memwrap.evaluation import run
from memwrap.evaluation.controls import SINKS
from memwrap.testing.families import build
from memwrap.testing.helpers import ids, wrapped


@pytest.mark.parametrize("memory", ["liger", "lolcats"])
def test_branches_beside_the_untrained_window(memory: str, tmp_path: Path) -> None:
    rows = [ids(1, 45, seed=1)[0], ids(1, 38, seed=2)[0]]
    model = wrapped(memory)
    result = run.linear_usage(model, rows)["linear-usage"]
    names = [
        "memory",
        "only window",
        "only recurrent",
        "base, full context",
        "base, window + sinks",
    ]
    assert list(result.curves) == names
    own = model.memories[memory]
    for name, branch in (("memory", "both"), *((n, n[5:]) for n in names[1:3])):
        with torch.no_grad(), own.only(branch):
            nll = [
                F.cross_entropy(model(r[None]).logits[0, :-1], r[1:], reduction="none")
                for r in rows
            ]
        assert result.curves[name].overall == pytest.approx(float(torch.cat(nll).mean()), rel=1e-5)
    assert abs(result.curves["only window"].gain) > 1e-5
    # The baseline has the window of the model, and the sinks beside it.
    other = memwrap.wrap(
        build("llama"), "window", window_size=own.config.window_size, num_sinks=SINKS
    )
    with torch.no_grad():
        nll = [
            F.cross_entropy(other(r[None]).logits[0, :-1], r[1:], reduction="none") for r in rows
        ]
    want = float(torch.cat(nll).mean())
    assert result.curves["base, window + sinks"].overall == pytest.approx(want, rel=1e-4)
    paths = run.write({"linear-usage": result}, tmp_path)
    assert [p.name for p in paths] == [f"linear-usage.{e}" for e in ("json", "html", "png")]
    assert json.loads(paths[0].read_text())["documents"] == 2
    assert "| only recurrent |" in run.table({"linear-usage": result})


def test_a_model_that_is_not_linearized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"recurrence beside a window.*model has rmt"):
        run.linear_usage(wrapped("rmt"), [ids(1, 20)[0]])
    without = wrapped("liger", window_size=0)
    curves = run.linear_usage(without, [ids(1, 20)[0]])["linear-usage"].curves
    assert "only window" not in curves and "only recurrent" in curves
