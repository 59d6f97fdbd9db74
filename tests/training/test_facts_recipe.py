"""The recipe of a memory that helps: its task, its start, and what a run says at its end."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_pieces_and_padding
from transformers import AutoTokenizer

import memwrap
from memwrap.assets import asset
from memwrap.memories.armt import discriminant
from memwrap.tasks import task
from memwrap.tasks.base import FIRST_SEED
from memwrap.tasks.told import NAMES, PLACES, THINGS, shared_out
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, ids, wrapped
from memwrap.training import held_out
from memwrap.training.finetune import build_model, run_recipe
from memwrap.training.held_out import few, gain_in_words, held_back, memory_gain, task_rows
from memwrap.training.recipe import load_recipe
from memwrap.training.start import segments, text_ids
from memwrap.training.watch import LossWatch

SMALL = ["model.name=tiny-lm", "memory.d_mem=8", "start.segments=6", "trainer.batch_size=2",
         "trainer.steps=2", "tasks.curriculum=0:63"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(asset("tiny-lm"))


@pytest.mark.parametrize("name", ["told_facts", "told_facts_5"])
def test_a_fact_lies_inside_a_block_and_training_has_others(name: str, tokenizer: Any) -> None:
    for seed in (3, 4, FIRST_SEED + 5, FIRST_SEED + 6):
        sample = task(name).sample(tokenizer, 320, seed)
        ((first, end),) = sample.facts[0]
        fact, text = tokenizer.decode(sample.ids[first:end]), tokenizer.decode(sample.ids)
        assert first // 32 == (end - 1) // 32 < sample.ask // 32
        assert len(sample.ids) + len(sample.answer) == 319  # one short of ten blocks
        thing = text.rpartition("Where is the ")[2].partition("?")[0]
        assert thing in fact and sample.references[0] in fact
        mine = shared_out(THINGS, seed >= FIRST_SEED), shared_out(NAMES, seed >= FIRST_SEED)
        assert thing in mine[0] and any(n in fact for n in mine[1])
        assert sum(f" {place}." in text for place in PLACES) >= (5 if name.endswith("5") else 1)
    for words in (THINGS, NAMES):
        assert not {*shared_out(words, True)} & {*shared_out(words, False)}
    whole = task(name).sample(tokenizer, 320, 1, depth=0.0)
    assert whole.facts[0][0][0] < 32
    with pytest.raises(ValueError, match="needs at least"):
        task(name).sample(tokenizer, 40, 0)


def test_segments_to_start_from(tokenizer: Any) -> None:
    rows, worth = segments(tokenizer, ["told_facts"], 32, 4, 0)
    assert rows.shape == (8, 32) and worth.tolist() == [True] * 4 + [False] * 4
    told = [any(f" the {p}." in tokenizer.decode(row) for p in PLACES) for row in rows]
    assert told == worth.tolist()
    with pytest.raises(ValueError, match="too few facts inside segments of 4 tokens"):
        segments(tokenizer, ["told_facts"], 4, 4, 0)


def test_a_discriminant_tells_two_kinds_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.arange(60) < 30
    x = torch.randn(60, 40, generator=generator)
    x[:, 3] += 3.0 * kinds
    weight, bias = discriminant(x, kinds)
    scores = x @ weight + bias
    assert_close(scores[kinds].mean(), torch.tensor(3.0), 1e-4)
    assert_close(scores[~kinds].mean(), torch.tensor(-3.0), 1e-4)
    other = torch.randn(60, 40, generator=generator)
    other[:, 3] += 3.0 * kinds
    assert float(((other @ weight + bias > 0) == kinds).float().mean()) > 0.8


def test_memory_tokens_that_do_not_read_write_what_they_wrote_alone() -> None:
    """With them reading, the second segment's write depends on the first."""
    text, other = ids(1, 16, seed=1), ids(1, 16, seed=2)
    other[:, 8:] = text[:, 8:]
    for reads in (True, False):
        config = memwrap.ARMTConfig(
            segment_size=8, num_memory_tokens=3, d_mem=8, value_init="identity", written_tokens=1,
            gate_init=2.0, layers="late", tokens_read=reads, correction=False, token_gate=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = memwrap.wrap(build("llama"), config).eval()
        assert_pieces_and_padding(model)
        memory_layer = int(next(iter(model.memories["armt"].layers)))
        # No token tells another there, so that only what memory tokens read themselves is left.
        torch.nn.init.zeros_(model.parts.layers[memory_layer].self_attn.o_proj.weight)
        seen: list[torch.Tensor] = []
        for row in (text, other):
            handle = model.parts.layers[memory_layer].register_forward_hook(
                lambda m, i, o, seen=seen: seen.append(
                    (o[0] if isinstance(o, tuple) else o)[:, -3:]
                )
            )
            model.read(row)
            handle.remove()
        apart = error_of(seen[1], seen[3])
        assert (apart > 1e-3) if reads else (apart == 0), apart


def test_what_is_read_is_as_large_as_the_hidden_state_says() -> None:
    """Ten times the hidden state, ten times the read; the raw form gives the same for both."""
    forms = ("hidden", False, 10.0), ("hidden", True, 10.0), ("raw", False, 1.0)
    for scale, gated, wanted in forms:
        config = memwrap.ARMTConfig(
            d_mem=8, value_init="normal", read_scale=scale, token_gate=gated, layers=[1]
        )
        model = memwrap.wrap(build("llama"), config)
        layer: Any = model.memories["armt"].layers["1"]
        hidden = torch.randn(1, 5, model.parts.config.hidden_size)
        A = torch.rand(1, 1, 48, hidden.shape[2])
        z = torch.rand(1, 1, 48)
        with torch.no_grad():
            one, ten = layer.read(hidden, A, z), layer.read(10 * hidden, A, z)
            assert_close(ten, wanted * one, 1e-3)
            if gated:  # shut for tokens of one kind, as it was for the others
                layer.share.weight.copy_(-100 * hidden[:, 0])
                shut = layer.read(hidden, A, z)
                assert float(shut[:, 0].abs().max()) < 1e-6 < float(one[:, 0].abs().max())
                layer.share.weight.zero_()
                layer.share.bias.fill_(30.0)
                layer.config = replace(config, token_gate=False)
                ungated = layer.read(hidden, A, z)
                layer.config = config
                assert_close(layer.read(hidden, A, z), ungated, 1e-6)


@pytest.mark.slow
def test_the_recipe_starts_from_a_question_and_says_what_memory_is_worth(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = load_recipe("armt_facts", [*SMALL, f"output={folder}"])
    model, tokenizer = build_model(recipe)
    question = text_ids(recipe.start.text or "", tokenizer)
    memory: Any = model.memories["armt"]
    assert memory.config.num_memory_tokens == len(question) == memory.num_suffix
    embeds = model.get_input_embeddings()(torch.tensor(question))
    assert torch.equal(memory.tokens, embeds) and not memory.tokens.requires_grad
    for layer in memory.layers.values():
        assert float(layer.value.bias.detach().abs().max()) > 1e-2
        assert float(layer.beta.weight.detach().abs().max()) > 1e-2
    run_recipe(recipe)
    about = json.loads((folder / "run.json").read_text())
    assert about["steps"] == about["planned_steps"] == 2 and about["held_out_rows"] == 16
    assert about["memory_gain"] == pytest.approx(about["memory_off"] - about["memory_on"])
    assert memwrap.load(folder).memory_configs[0].layers == "late"


def test_gain_is_zero_where_memory_gives_nothing(tokenizer: Any) -> None:
    model = memwrap.load("armt-lm")
    for layer in model.memories["armt"].layers.values():
        torch.nn.init.zeros_(layer.value.weight)
    rows = few(task_rows(["told_facts"], tokenizer, 159, 287))
    assert len(rows) == 16
    assert memory_gain(model, [{"input_ids": ids(1, 120)[0]} for _ in range(3)]) == {}
    rows = [{"input_ids": ids(1, n)[0]} for n in (200, 300)]
    found = memory_gain(model, rows)
    assert found["memory_gain"] == pytest.approx(0, abs=1e-5) and found["held_out_rows"] == 2
    text, warning = gain_in_words(found | {"memory_gain_error": 0.1})
    assert "+- 0.1000 (2 rows)" in text and "makes no difference from" in (warning or "")
    assert gain_in_words(found | {"memory_gain": 0.3, "memory_gain_error": 0.1})[1] is None
    assert "is worse than" in (
        gain_in_words(found | {"memory_gain": -0.3, "memory_gain_error": 0.1})[1] or ""
    )
    assert gain_in_words({}) == ("", None)
    assert "not measured" in gain_in_words({"held_out_rows": 0})[0]


@pytest.mark.parametrize("memory", ["armt", "hmt", "landmark", "memory_decoder", "rmt", "window"])
def test_rows_are_judged_together_as_alone(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(memory)
    rows = [{"input_ids": ids(1, n, seed=n)[0]} for n in (33, 70, 21, 46)]
    rows[1]["labels"] = rows[1]["input_ids"].masked_fill(torch.arange(70) < 60, -100)
    together = memory_gain(model, rows)
    monkeypatch.setattr(held_out, "TOGETHER", 0)
    alone = memory_gain(model, rows)
    assert together["held_out_rows"] == alone["held_out_rows"] == 4
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-5)
    assert abs(together["memory_gain"]) > 1e-3, "the memory does not matter here"


def test_rows_that_are_held_back() -> None:
    train, held = held_back(list(range(19)))  # type: ignore[arg-type]
    assert held is None and len(train) == 19  # type: ignore[arg-type]
    assert held_back(list(range(39)))[1] is None  # type: ignore[arg-type]
    train, held = held_back(list(range(45)))  # type: ignore[arg-type]
    assert [*train] == list(range(43)) and [*held] == [43, 44]  # type: ignore[misc]
    long = [{"input_ids": torch.zeros(5000)} for _ in range(9)]
    assert len(few(long)) == 2 and len(few(islice(iter(long), 9))) == 2


def test_a_run_that_makes_the_model_worse_is_noticed(caplog: Any) -> None:
    def run(losses: list[float]) -> LossWatch:
        watch = LossWatch()
        for step, loss in enumerate(losses):
            watch.add(loss / 2, step)
            watch.add(loss / 2, step)
        watch.add(0.0, len(losses))
        return watch

    better = run([3.8, 3.7, 3.9, 3.5, 3.6, 4.2, 3.0, 2.5])
    assert better.wrong is None and not better.lost
    with caplog.at_level(logging.WARNING):
        worse = run([3.8, 3.9, 4.5, 5.3, 5.2, 5.4, 5.3, 5.5])
    assert worse.wrong is not None and not worse.lost
    assert run([3.8, 3.9, 4.5, *[12.0] * 6]).lost
