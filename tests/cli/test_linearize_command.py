"""`memwrap linearize`: the stages, the choice of layers, and going on, on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run

import memwrap
from memwrap.training.callbacks import TimeLimit
from memwrap.training.layer_choice import kept_softmax
from memwrap.training.linearize_recipe import linearize_recipe
from memwrap.training.recipe import load_recipe

SMALL = [
    "segment_size=32", "window_size=8", "lora.r=2", "data.max_tokens=32", "data.min_tokens=16",
    "stages.text.data.max_tokens=64", "stages.text.data.min_tokens=40", "trainer.device=cpu",
    "trainer.save_every=1", "trainer.log_every=1",
    *(f"stages.{name}.trainer.steps=2" for name in ("mixers", "logits", "text")),
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for index in range(30):
        text = " ".join(f"Line {n} of text {index} says {n * index}.\n" for n in range(30))
        (folder / f"text{index}.md").write_text(text)
    return folder


@pytest.mark.slow
def test_stages_follow_each_other_and_go_on(
    base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    words = ["linearize", base, "--memory", "lolcats", "--data", texts, "--out", output, *SMALL]
    words += ["layers=auto", "keep=1", "layer_choice.task=told_facts", "layer_choice.rows=2",
              "layer_choice.tokens=64", "layer_choice.pieces=2", "segment_size=64"]  # fmt: skip
    # The second stage is stopped behind its first step.
    count = {"steps": 0}
    ordinary = TimeLimit.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ordinary(self, args, state, control, **kwargs)
        count["steps"] += 1
        if count["steps"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimeLimit, "on_step_end", stop)
    run(*words, expect=130)
    first = json.loads((output / "stages" / "mixers" / "run.json").read_text())
    sweep = json.loads((output / "stages" / "layer_choice" / "layer_choice.json").read_text())
    assert not (output / "config.json").exists()
    assert "resume=true" in run(*words, expect=2).output
    text = run(*words, "resume=true").output
    assert "100%" in text  # every bar that began has ended there
    about = json.loads((output / "run.json").read_text())
    assert about["stages"]["mixers"] == first, "a stage that had ended ran again"
    assert [about["stages"][n]["steps"] for n in ("mixers", "logits", "text")] == [2, 2, 2]
    command = about["command"].split()
    assert command[:3] == ["memwrap", "linearize", str(base)] and "layers=auto" in command
    run(*command[1:], "--dry-run")
    # The choice stands in the saved config, its figures beside it.
    assert json.loads((output / "layer_choice.json").read_text()) == sweep
    kept, converted = sweep["kept"], sweep["converted"]
    assert sorted(kept + converted) == [0, 1] and len(kept) == 1
    assert [row["converted"] for row in sweep["sweep"]] == [0, 1, 1, 2]
    assert kept_softmax(sweep["sweep"], 1) == (converted, kept)
    model: Any = memwrap.load(output)
    assert model.memory_configs[0].layers == converted
    assert list(model.memories["lolcats"].maps) == [str(n) for n in converted]
    # The command is a recipe, which can be run as any other.
    recipe = load_recipe(output / "recipe.yaml")
    assert [Path(r.output).name for r in recipe.runs] == ["mixers", "logits", "text"]
    assert recipe.runs[0].trainer.mixer_matching and recipe.runs[1].init_from is not None


@pytest.mark.parametrize("memory", ["liger", "ahn"])
def test_one_stage_that_time_ends(base: Path, texts: Path, tmp_path: Path, memory: str) -> None:
    """Its bar ends whole, too."""
    words = ["linearize", base, "--memory", memory, "--data", texts, "-o", tmp_path / "x"]
    words += [word for word in SMALL if not word.startswith("stages.")]
    words += ["--stages", "mixers", "trainer.max_minutes=0.000001", "stages.mixers.trainer.steps=9"]
    text = run(*words).output
    assert "mixers: 1 of 9 steps" in text
    assert "100%" in text and "1/1" in text
    log = (tmp_path / "x" / "stages" / "mixers" / "train_log.jsonl").read_text().splitlines()
    assert 0 < json.loads(log[0])["loss"] < 10
    assert memwrap.load(tmp_path / "x").memory_configs[0].layers is None  # type: ignore[attr-defined]


def test_layers_are_chosen_behind_mixers_alone(base: Path, texts: Path, tmp_path: Path) -> None:
    """What stage 1 taught the layers that stay converted is kept; the others are the base's."""
    words = ["linearize", base, "--memory", "lolcats", "--data", texts, "-o", tmp_path / "x"]
    words += [word for word in SMALL if not word.startswith("stages.")]
    words += ["--stages", "mixers", "stages.mixers.trainer.steps=2", "segment_size=64"]
    run(*words, "layers=auto", "keep=1", "layer_choice.rows=1", "layer_choice.tokens=64")
    sweep = json.loads((tmp_path / "x" / "layer_choice.json").read_text())
    model: Any = memwrap.load(tmp_path / "x")
    whole: Any = memwrap.load(tmp_path / "x" / "stages" / "mixers")
    (kept,), (other,) = sweep["kept"], sweep["converted"]
    assert model.memory_configs[0].layers == [other]
    for (name, got), (_, want) in zip(
        model.parts.layers.named_parameters(), whole.parts.layers.named_parameters(), strict=True
    ):
        if "lora_B" in name:
            same = torch.equal(got, want)
            assert same == name.startswith(f"{other}.") and bool(want.any())
            assert bool(got.any()) == same
    maps = model.memories["lolcats"].maps[str(other)], whole.memories["lolcats"].maps[str(other)]
    assert torch.equal(maps[0].query, maps[1].query)
    assert kept != other


def test_a_dry_run_prints_the_recipe(base: Path, tmp_path: Path) -> None:
    out = run("linearize", base, "--stages", "logits,text", "--dry-run", "-o", tmp_path / "x")
    values = yaml.safe_load(out.output)
    assert list(values["stages"]) == ["logits", "text"] and values["memory"]["name"] == "liger"
    assert not (tmp_path / "x").exists()


def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path) -> None:
    def refused(*words: str, memory: str = "liger", stages: str = "mixers") -> str:
        given = ["linearize", base, "--memory", memory, "--stages", stages, "-o", tmp_path / "x"]
        return run(*given, *words, expect=2).output

    assert "stands beside the attention" in refused(memory="armt")
    assert "in this order" in refused(stages="text,mixers")
    assert "in this order" in refused(stages="mixers,words")
    assert "a stage that is not run" in refused("stages.text.trainer.steps=3")
    assert "needs layers=auto" in refused("keep=3")
    assert "did you mean" in refused("window_siz=3")
    assert "unknown key `trainer.step`" in refused("stages.mixers.trainer.step=3")
    assert "`stages`" in refused("stages.mixers.output=elsewhere")
    recipe = linearize_recipe(str(base), "liger", ["text"], "stdlib", tmp_path)
    with pytest.raises(ValueError, match="below 2"):
        kept_softmax([{"layer": n, "answer_nats": 1.0, "text_nats": 0.0} for n in (0, 1)], 2)
    assert recipe.runs[0].memory["bptt_segments"] == 1  # type: ignore[index]


def test_layers_are_ranked_by_answers_then_text() -> None:
    rows = [(None, 9.0, 9.0), (0, 1.0, 2.0), (1, 3.0, 1.0), (2, 1.0, 3.0), (3, 0.5, 9.0)]
    figures = [{"layer": n, "answer_nats": a, "text_nats": t} for n, a, t in rows]
    assert kept_softmax(figures, 1) == ([0, 2, 3], [1])
    assert kept_softmax(figures, 2) == ([0, 3], [1, 2])
