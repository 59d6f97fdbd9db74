"""`memwrap bench memories`, with a tiny random model and a plan of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import run

import memwrap
from memwrap.comparison.runs import FORMAT, PLAN, VERSION, Plan, read_results
from memwrap.comparison.tables import page
from memwrap.evaluation.controls import CURVES, MEMORY, OFF, SHUFFLED

MEMORIES = ("infini", "memoryprompt")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for split in ("train", "test"):
        (folder / "text" / split).mkdir(parents=True)
        for number in range(3):
            lines = (f"Line {n} of {split} {number} says {n * number}.\n" for n in range(60))
            (folder / "text" / split / f"{number}.txt").write_text("".join(lines))
    values = yaml.safe_load(PLAN.read_text())
    values["documents"] |= {"budget": 100, "held_out": {"count": 2, "tokens": 96}}
    data = {"source": str(folder / "text"), "max_tokens": 48, "min_tokens": 16}
    values["documents"]["recipe"]["data"] |= data
    values["documents"]["recipe"]["trainer"]["batch_size"] = 1
    values["documents"]["memory"]["segment_size"] = 16
    values["recall"] |= {"budget": 200, "held_out": {"distances": [1, 8, 32], "samples": 4}}
    values["recall"]["recipe"]["trainer"]["batch_size"] = 2
    values["speed"] = {"tokens": 64, "rounds": 1}
    values["memories"] = {
        "infini": {"documents": {"update": "delta"}},
        "memoryprompt": {"lora": None, "note": "has a note"},
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def results(base: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    words = ("bench", "memories", "--train", "--model", base, "--plan", plan, "-o", folder)
    run(*words, "--only", MEMORIES[0])
    before = (folder / "infini.json").stat().st_mtime_ns, (folder / "base.json").read_text()
    output = run(*words, "--only", ",".join(MEMORIES)).output
    assert "memoryprompt" in output and "has a note" in output
    about = json.loads(before[1])
    assert json.loads((folder / "base.json").read_text())["recall"] == about["recall"]
    return folder


@pytest.mark.slow
def test_every_figure_is_there(results: Path) -> None:
    found = read_results(results)
    assert sorted(found) == ["base", *MEMORIES]
    assert found["base"]["speed"].keys() == {"read", "decode"}
    for name in MEMORIES:
        own = found[name]
        assert own["steps"] == {"documents": 2, "recall": 2}
        assert own["budget"] == {"documents": 100, "recall": 200}
        assert set(own["perplexity"]["curves"]) == set(CURVES)
        assert own["recall"]["rewrite"]["distances"] == [1, 8, 32]
        assert own["recall"]["remember"]["distances"] == [1, 8]
        assert set(own["recall"]["rewrite"]["accuracy"]) == {MEMORY, OFF, SHUFFLED}
        assert own["costs"]["added_parameters"] > 0 and own["costs"]["state_bytes"] > 0
        assert min(own["speed"].values()) > 0
        assert all(seconds > 0 for seconds in own["training_seconds"].values())
    assert found["infini"]["lora"] and found["memoryprompt"]["lora"] is None
    assert found["infini"]["settings"]["documents"] == {"segment_size": 16, "update": "delta"}
    assert (results / "comparison.png").read_bytes().startswith(b"\x89PNG")
    text = page(found, "a command", link="[{0}](methods/{0}.md)")
    assert "[infini](methods/infini.md)" in text and "1x" not in text and "4x" in text


@pytest.mark.slow
def test_what_is_there_is_not_measured_again(results: Path, base: Path, plan: Path) -> None:
    before = json.loads((results / "infini.json").read_text())
    words = ("bench", "memories", "--train", "--model", base, "--plan", plan, "-o", results)
    run(*words, "--only", "infini")
    after = json.loads((results / "infini.json").read_text())
    assert {**before, "speed": 0} == {**after, "speed": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", 1), "less than one step on documents"),
        (("--recall-budget", 20_000), "with budget"),
        (("--only", "infinity"), "infini"),
    ],
)
def test_mistakes_are_named(
    words: tuple, message: str, base: Path, plan: Path, tmp_path: Path
) -> None:
    about = {"format": FORMAT, "version": VERSION, "memory": "base", "model": str(base)}
    about["budget"] = {"documents": 100, "recall": 200}
    (tmp_path / "base.json").write_text(json.dumps(about))
    line = ("bench", "memories", "--train", "--model", base, "--plan", plan, "-o", tmp_path, *words)
    assert message in run(*line, expect=2).output


def test_foreign_files_are_refused(base: Path, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": "something"}')
    line = ("bench", "memories", "--train", "--model", base, "--plan", plan, "-o", tmp_path)
    assert "other.json" in run(*line, expect=2).output
    assert "no plan" in run(*line[:5], "--plan", tmp_path / "other.json", expect=2).output


def test_the_shipped_plan_names_every_memory_and_fits_their_configs(tmp_path: Path) -> None:
    loaded = Plan.load()
    assert sorted(loaded.values["memories"]) == sorted(memwrap.available())
    assert loaded.steps("documents") == 60 and loaded.steps("recall") == 240
    for name in memwrap.available():
        for part in ("documents", "recall"):
            recipe = loaded.recipe(name, part, tmp_path)
            memwrap.config_class(name).from_dict(recipe["memory"])
            assert recipe["trainer"]["steps"] == loaded.steps(part)
