"""`memwrap bench memories --model NAME`: memories at equal bytes, on a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import run
from support import save_small_base
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.comparison import board as boards
from memwrap.comparison import board_page as pages
from memwrap.comparison.board_readers import (
    bytes_of_token,
    decoding_seconds,
    knows,
    read_with_base,
    read_with_memory,
)
from memwrap.comparison.board_sizes import scale_of
from memwrap.comparison.board_texts import Asked, exams
from memwrap.tasks.invented import FACTS

MEMORIES = ("window", "compressive", "infllm", "rmt", "memoryprompt", "infini")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random model, with a context that holds the texts."""
    folder = save_small_base(tmp_path_factory.mktemp("base") / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = yaml.safe_load(boards.PLAN.read_text())
    values |= {"texts": 2, "tokens": 300, "facts": 3, "segment_size": 16, "shuffled": True}
    values["budgets"] = [0.02, 0.05]
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def folder(base: Path, plan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    words = ("bench", "memories", "--model", base, "--plan", plan, "-o", folder)
    run(*words, "--only", "window")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*MB.json")}
    output = run(*words, "--only", ",".join(MEMORIES)).output
    assert "# Memories on a real model" in output and len(before) == 4
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    return folder


@pytest.mark.slow
def test_every_cell_is_there_and_fits_its_budget(folder: Path) -> None:
    cells = {boards.key_of(cell): cell for cell in boards.read_cells(folder)}
    alone = {"base_whole_text", "base_no_text", "infllm", "rmt", "memoryprompt", "infini"}
    sized = {f"{n}-{mb}MB" for n in ("window", "compressive", "base_truncated")
             for mb in ("0.02", "0.05")}  # fmt: skip
    assert cells.keys() == alone | sized
    assert {cells[n]["kind"] for n in ("memoryprompt", "infini")} == {boards.UNTRAINED}
    assert cells["rmt"]["kind"] == boards.LISTED and cells["rmt"]["texts"] == []
    for key in sized:
        size, budget = pages.bytes_of(cells[key]), cells[key]["budget"] * 1e6
        assert 0.85 * budget < size <= budget, key
    for key, cell in cells.items():
        for text in cell["texts"]:
            assert len(text["hits"]) == 3
            assert len(text["nats"]) == (0 if key == "base_no_text" else text["tokens"] - 1)
        assert all(len(text["shuffled"]) == 3 for text in cell["texts"])


@pytest.mark.slow
def test_the_page_says_what_the_cells_say(folder: Path) -> None:
    cells = boards.read_cells(folder)
    text = pages.board_page(folder, "a command", "x.png", link="[{1}](methods/{0}.md)")
    for cell in cells:
        nats = pages.nats_of(cell)
        assert nats is None or f"| {nats:.3f} |" in text
    assert "[window + sinks](methods/window.md)" in text and "figures/x.png" in text
    assert "[rmt](methods/rmt.md): needs training" in text and "Not measured" not in text
    assert len(pages.sentences(cells)) == 3
    assert (folder / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    (folder / "infini.json").rename(folder / "infini.away")
    try:
        assert "Not measured yet: infini." in pages.board_page(folder, "a command", "x.png")
    finally:
        (folder / "infini.away").rename(folder / "infini.json")


def test_gaps_are_paired() -> None:
    def cell(nats: list[float], hits: list[bool]) -> dict[str, Any]:
        return {"texts": [{"nats": nats, "hits": hits}]}

    ones = cell([1.0] * 256, [True, True, False, True])
    others = cell([1.0] * 128 + [3.0] * 128, [True, False, False, False])
    assert pages.nats_gap(others, ones) == pytest.approx((1.0, 1.0))
    mean, error = pages.facts_gap(ones, others)
    assert mean == 0.5 and error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_the_front_keeps_what_no_cheaper_point_beats() -> None:
    assert pages.front([(3, 1.0), (1, 2.0), (2, 2.5), (4, 1.0)]) == [(1, 2.0), (3, 1.0)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_memory_that_sees_all_gives_what_the_base_gives(
    template: str | None, tmp_path: Path
) -> None:
    """The same nats, choices and decoded tokens, and the same bytes a token."""
    place = save_small_base(tmp_path)
    base: Any = AutoModelForCausalLM.from_pretrained(place).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = template
    exam = exams(tokenizer, 1, 200, 2, 0)[0]
    each = bytes_of_token(base, exam.ids)
    cached = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, float32
    assert cached <= each <= cached + 10  # its id and its mark
    plain = read_with_base(base, exam.ids, len(exam.ids), each)
    model = memwrap.wrap(base, "window", segment_size=4096, window_size=4096).eval()
    memory = read_with_memory(model, exam.ids)
    torch.testing.assert_close(memory.nats, plain.nats, atol=1e-4, rtol=1e-4)
    assert plain.bytes == each * len(exam.ids) and memory.bytes >= cached * 128
    new = torch.tensor([exam.asked[0].ids])
    with plain.after() as one, memory.after() as other, torch.no_grad():
        wanted = one(new, 3)
        torch.testing.assert_close(other(new, 3), wanted, atol=1e-4, rtol=1e-4)
    for read in (plain, memory):
        right = Asked([*new[0].tolist(), int(wanted[-1].argmax())], 1, 0.5)
        wrong = Asked([*new[0].tolist(), int(wanted[-1].argmin())], 1, 0.5)
        assert knows(read, right, base.device) and not knows(read, wrong, base.device)
        assert decoding_seconds(read, exam.asked[0], base.device) > 0
    halves = read_with_base(base, exam.ids, 100, each)
    first = read_with_base(base, exam.ids[:100], 100, each)
    assert halves.nats[:99] == pytest.approx(first.nats) and halves.nats[150] != plain.nats[150]


def test_facts_stand_in_their_texts_and_answers_end_the_questions() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    told = []
    for exam in exams(tokenizer, 2, 400, 4, 1):
        text = tokenizer.decode(exam.ids)
        inside = [f for f in FACTS if f.sentence in text]
        told += inside
        places = [text.index(f.sentence) / len(text) for f in inside]
        assert len(inside) == len(exam.asked) == 4
        for place, asked in zip(sorted(places), exam.asked, strict=True):
            assert abs(place - asked.depth) < 0.15
            answer = tokenizer.decode(asked.ids[-asked.count :]).strip()
            assert answer in {f.answer for f in inside}
    assert len(set(told)) == 8


@pytest.mark.slow
def test_what_keeps_the_text_has_no_scale() -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(asset("tiny-lm")).eval()
    ids = list(range(5, 605))
    settings = {"segment_size": 32}
    assert scale_of(base, "infllm", {**settings, "block_size": 16, "num_sinks": 4}, ids) is None
    assert scale_of(base, "infini", settings, ids) is None
    scale = scale_of(base, "compressive", settings, ids)
    assert scale is not None
    found = scale.settings(1e6)
    assert found is not None and found["memory_size"] == found["compressed_size"]
    assert scale.settings(1000) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--budget", 100), "goes with --train"),
        (("--train", "--megabytes", "4"), "goes with --no-train"),
        (("--megabytes", "much"), "give numbers"),
        (("--only", "windw"), "window"),
        (("--megabytes", "4"), "another values"),
    ],
)
def test_mistakes_of_a_leaderboard_are_named(
    words: tuple, message: str, tmp_path: Path, base: Path, plan: Path
) -> None:
    head = {"format": boards.FORMAT, "version": boards.VERSION, "model": str(base), "cells": {},
            "values": boards.load_board_plan(plan)}  # fmt: skip
    (tmp_path / boards.HEAD).write_text(json.dumps(head))
    line = ("bench", "memories", "--model", base, "--plan", plan, "-o", tmp_path, *words)
    assert message in " ".join(run(*line, expect=2).output.split())


def test_other_plans_and_too_much_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match="no plan of a leaderboard"):
        boards.load_board_plan(tmp_path / "plan.yaml")
    (tmp_path / "x.json").write_text(json.dumps({"format": "else"}))
    with pytest.raises(ValueError, match="no result of a leaderboard"):
        boards.read_cells(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    with pytest.raises(ValueError, match="fewer"):
        exams(tokenizer, 10, 100, 10, 0)
    (tmp_path / "short.txt").write_text("A word. " * 10)
    with pytest.raises(ValueError, match="tokens"):
        exams(tokenizer, 1, 1000, 2, 0, str(tmp_path / "short.txt"))
