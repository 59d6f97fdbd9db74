"""InfLLM against a reading token by token, and what its settings promise."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from one_layer import OneLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import memwrap
from memwrap.backbones.rotary import rotate
from memwrap.io.checksums import checksums
from memwrap.memories.parts.grouped_units import QueryGroups
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    assert_close,
    assert_same_states,
    error_of,
    ids,
    padded,
    tiny,
    wrapped,
)

HEADS, KV_HEADS, WIDTH = 4, 2, 8


class ByToken:
    """The method in plain Python, one row, float64: lists of tokens, sets of who is seen."""

    def __init__(self, config: memwrap.InfLLMConfig, rotary: Any, q: Tensor, k: Tensor, v: Tensor):
        self.c, self.rotary, self.q, self.k, self.v = config, rotary, q, k, v
        self.scores = torch.zeros(HEADS, q.shape[1], dtype=torch.float64)
        self.units: list[list[int]] = []
        self.reps: list[Tensor] = []
        self.since: list[int] = []
        self.chosen: list[int] = []
        self.closed = 0

    def turned(self, x: Tensor, place: int) -> Tensor:
        angles = self.rotary.angles(torch.tensor([[place]]), 0, x)
        return rotate(x[None, :, None], angles)[0, :, 0]

    def select(self, place: int) -> None:
        c, mean = self.c, self.q[:, self.since].mean(1)
        query = self.turned(mean, c.window_size - 1)
        worth = [float((query * rep).sum()) for rep in self.reps]
        best = sorted(range(len(worth)), key=lambda u: (-worth[u], -u))[: c.top_k]
        self.chosen, self.since = sorted(best), []

    def token(self, t: int) -> Tensor:
        c = self.c
        self.since.append(t)
        if (t - self.closed) % c.retrieval_interval == 0:
            self.select(t)
        near = [j for j in range(t + 1) if t - j < c.window_size]
        free = {j for unit in self.units for j in unit}
        far = [j for j in range(t + 1) if t - j >= c.window_size and j not in free]
        far += [j for u in self.chosen for j in self.units[u]]
        out = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
        for h in range(HEADS):
            kv = h // (HEADS // KV_HEADS)
            query = self.turned(self.q[:, t], t)[h]
            at_reach = self.turned(self.q[:, t], c.window_size - 1)[h]
            own = [float(query @ self.turned(self.k[:, j], j)[kv]) for j in near]
            others = [float(at_reach @ self.k[kv, j]) for j in far]
            logits = torch.tensor(own + others, dtype=torch.float64) / math.sqrt(WIDTH)
            weights = logits.softmax(0)
            out[h] = weights @ self.v[kv, near + far]
            for n, j in enumerate(near):
                if c.score == "attention":
                    self.scores[h, j] += weights[n]
                elif j != t:
                    self.scores[h, j] += own[n]
        return out

    def close(self, tokens: int) -> None:
        c, self.closed = self.c, tokens
        while (first := c.num_sinks + len(self.units) * c.block_size) + c.block_size <= (
            tokens - c.window_size
        ):
            unit = list(range(first, first + c.block_size))
            self.units.append(unit)
            rep = []
            for h in range(HEADS):
                best = sorted(unit, key=lambda j: -float(self.scores[h, j]))
                best = best[: c.num_representatives]
                rep.append(self.k[h // (HEADS // KV_HEADS), best].mean(0))
            self.reps.append(torch.stack(rep))


@pytest.mark.parametrize("score", ["attention", "dot_product"])
@pytest.mark.parametrize("interval", [1, 3])
def test_agrees_with_a_reading_token_by_token(score: str, interval: int) -> None:
    config = memwrap.InfLLMConfig(
        segment_size=5, window_size=9, num_sinks=2, block_size=4, top_k=2, num_representatives=2,
        score=score, retrieval_interval=interval,
    )  # fmt: skip
    torch.manual_seed(3)
    lengths = [5, 5, 5, 3, 5, 5, 1, 5, 5, 5, 4]
    total = sum(lengths)
    q = torch.randn(1, HEADS, total, WIDTH, dtype=torch.float64) * 2
    k, v = torch.randn(2, 1, KV_HEADS, total, WIDTH, dtype=torch.float64) * 2
    layer = OneLayer(config, HEADS, KV_HEADS, WIDTH, dtype=torch.float64)
    plain = ByToken(config, layer.rotary, q[0], k[0], v[0])
    first = 0
    for length in lengths:
        columns = slice(first, first + length)
        got = layer.attend(q[:, :, columns], k[:, :, columns], v[:, :, columns])[0]
        want = torch.stack([plain.token(t) for t in range(first, first + length)], 1)
        # eager attention takes its softmax in float32
        assert_close(got, want, 1e-6, f"tokens from {first}")
        chosen = layer.state["chosen"][0, 0] - 1
        assert chosen[chosen >= 0].tolist() == plain.chosen
        first += length
        layer.close()
        plain.close(first)
        reps = layer.state["index"]["store"]["0"]["rep"][0]
        assert len(reps) == len(plain.reps)
        if plain.reps:
            assert_close(reps, torch.stack(plain.reps), 1e-12, "representatives")
    assert len(plain.units) > 2 * config.top_k


def long_text(rows: int = 1, tokens: int = 75, seed: int = 0) -> Tensor:
    return ids(rows, tokens, seed=seed)


@torch.no_grad()
def test_many_units_and_any_feed() -> None:
    """Far beyond the window, where units are really chosen; parts of a step of 128 queries."""
    text = ids(1, 600)
    model = wrapped("infllm", segment_size=150, window_size=160, block_size=8, top_k=3)
    want = model(text).logits
    assert_close(model(text[:, :530]).logits, want[:, :530])
    state = model.read(text[:, :457])
    pieces = [model(piece, cache=state).logits for piece in text[:, 457:].split([1, 40, 102], 1)]
    assert_close(torch.cat(pieces, 1), want[:, 457:])
    chosen = [tree["chosen"] for tree in state.memories["infllm"]["layers"].values()]
    assert all(bool((c > 0).all()) for c in chosen)
    changed = text.clone()
    changed[:, 560:] = 7
    assert_close(model(changed).logits[:, :560], want[:, :560], 1e-6)  # no choice looks ahead


@torch.no_grad()
def test_a_choice_for_the_whole_block_looks_ahead_and_depends_on_the_feed() -> None:
    """What `selection="block"` cannot promise, as its documentation says."""
    model, text = wrapped("infllm", selection="block", top_k=1), long_text()
    want = model(text).logits
    changed = text.clone()
    changed[:, 71:] = 7
    assert error_of(model(changed).logits[:, 64:71], want[:, 64:71]) > 1e-3
    state = model.new_state(1)
    fed = torch.cat([model(t, cache=state).logits for t in text.split(5, 1)], 1)
    assert error_of(fed, want) > 1e-3
    # Fed in whole segments it is one result, padded or not.
    state = model.new_state(1)
    fed = torch.cat([model(t, cache=state).logits for t in text.split(8, 1)], 1)
    assert_close(fed, want)
    rows, mask = padded([text[0], text[0, :41]], "left")
    got = model(rows, attention_mask=mask).logits
    assert_close(got[0], want[0])
    assert_close(got[1, -41:], model(text[:, :41]).logits[0])


@torch.no_grad()
def test_the_published_mask_shows_tokens_twice() -> None:
    """At the window's edge; with blocks of one token both masks are the same."""
    text = long_text()

    def logits(mask: str, tokens: int = 75, **settings: Any) -> Tensor:
        model = wrapped("infllm", selection="block", window_mask=mask, **settings)
        return model(text[:, :tokens]).logits

    published, corrected = logits("published"), logits("corrected")
    assert_close(published[:, :16], corrected[:, :16], 1e-6)
    assert error_of(published[:, 17:], corrected[:, 17:]) > 1e-2
    one = {"segment_size": 1, "tokens": 40}
    assert_close(logits("published", **one), logits("corrected", **one))


@torch.no_grad()
def test_offloading_changes_no_bit() -> None:
    texts = [long_text(2, seed=s) for s in (0, 1)]
    plain, offloading = wrapped("infllm"), wrapped("infllm", offload=True, cache_size=2)
    rows, mask = padded([texts[0][0], texts[0][1, :50]], "left")
    want = plain(rows, attention_mask=mask)
    got = offloading(rows, attention_mask=mask)
    assert torch.equal(got.logits, want.logits)
    states = [offloading.new_state(2) for _ in texts]
    parts: list[list[Tensor]] = [[], []]
    for columns in range(0, 75, 5):  # two documents share the slots
        for index, text in enumerate(texts):
            piece = text[:, columns : columns + 5]
            parts[index].append(offloading(piece, cache=states[index]).logits)
    for index, text in enumerate(texts):
        assert_close(torch.cat(parts[index], 1), plain(text).logits)
    slots = offloading.memories["infllm"].slots
    assert all(cache.hits > 0 and cache.misses > 0 for cache in slots.values())
    question = ids(1, 3, seed=5)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2}
    answers = [
        m.generate(question, cache=m.read(texts[0][:1]), **settings) for m in (plain, offloading)
    ]
    assert torch.equal(*answers)


@torch.no_grad()
@pytest.mark.parametrize(
    ("pays", "offload"),  # None: in some layers alone
    [
        (True, False),
        (None, True),
        pytest.param(None, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_groups_of_queries_read_their_units_apart(
    monkeypatch: pytest.MonkeyPatch, pays: bool | None, offload: bool
) -> None:
    text = long_text(2)
    rows, mask = padded([text[0], text[1, :50]], "left")
    model = wrapped("infllm", offload=offload)

    def read() -> list[Tensor]:
        state, parts = model.new_state(2), []
        for columns in range(0, text.shape[1], 5):
            parts.append(model(text[:, columns : columns + 5], cache=state).logits)
        layers = state.memories["infllm"]["layers"].values()
        noted = [x for tree in layers for x in (tree["recent"]["score"], tree["chosen"])]
        whole = model(text).logits, model(rows, attention_mask=mask).logits
        return [torch.cat(parts, 1), *noted, *whole]

    monkeypatch.setattr(QueryGroups, "pays", lambda *_: False)
    want = read()
    if pays:
        monkeypatch.setattr(QueryGroups, "pays", lambda *_: True)
    else:
        answers = itertools.cycle((True, False, False))
        monkeypatch.setattr(QueryGroups, "pays", lambda *_: next(answers))
    for got, expected in zip(read(), want, strict=True):
        assert_close(got, expected)


@torch.no_grad()
def test_what_is_offloaded_stays_on_the_host(tmp_path: Path) -> None:
    model = wrapped("infllm", offload=True)
    state = model.read(long_text())
    moved = state.to("meta").memories["infllm"]["layers"]["0"]
    assert moved["recent"]["key"].device.type == "meta"
    assert moved["index"]["store"]["0"]["rep"].device.type == "meta"
    assert moved["host"]["store"]["0"]["key"].device.type == "cpu"
    state.save(tmp_path / "state.safetensors")
    again = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
    assert_same_states(again, state, 0.0)


def test_training_through_offloaded_units_gives_the_same_gradients() -> None:
    text, found = long_text(), []
    for offload in (False, True):
        model = wrapped("infllm", offload=offload).train()
        loss = model(text, labels=text).loss
        loss.backward()
        found.append(model.backbone.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*found) and float(found[0].abs().max()) > 0


@torch.no_grad()
def test_old_pages_are_shared_not_copied() -> None:
    model = wrapped("infllm", block_size=2)
    state = model.read(long_text())
    before = state.memories["infllm"]["layers"]["0"]["units"]["store"]
    after = model.read(long_text(seed=1), state=state).memories["infllm"]["layers"]["0"]["units"]
    assert len(after["store"]) > len(before) > 1
    assert after["store"]["0"]["key"] is before["0"]["key"]


@torch.no_grad()
def test_the_state_grows_by_the_bytes_it_declares() -> None:
    model = wrapped("infllm", block_size=4, top_k=1)  # both have a unit to choose
    sizes = [model.read(long_text(tokens=n)).nbytes for n in (32, 72)]  # 40 tokens, 10 units
    memory = model.memories["infllm"]
    assert sizes[1] - sizes[0] == 40 * memory.bytes_per_token
    # Two layers of two KV heads, keys and values of 8 floats; 4 representatives a unit of 4.
    assert memory.bytes_per_token == 2 * (2 * 16 * 4 + 4 * 8 * 4 / 4)


@torch.no_grad()
def test_which_layers_look_up_units() -> None:
    def with_units(family: str, **settings: Any) -> list[str]:
        layers = wrapped("infllm", family, **settings).new_state(1).memories["infllm"]["layers"]
        return [name for name, tree in layers.items() if "units" in tree]

    assert with_units("llama") == ["0", "1"]
    assert with_units("gemma3") == ["1"]  # the other one has a window of its own
    assert with_units("mistral") == ["0", "1"]  # all have
    assert with_units("llama", layers=[0]) == ["0"]
    # Without units there are window and sinks: a token between them is not seen.
    base = build("llama")
    base.model.layers, base.config.num_hidden_layers = base.model.layers[:1], 1
    base.config.num_hidden_layers = 1
    text = long_text(tokens=60)
    between, sink = text.clone(), text.clone()
    between[:, 20], sink[:, 1] = 5, 7
    window = memwrap.wrap(base, tiny("infllm", top_k=1))
    want = window(text).logits[:, -1]
    window.memories["infllm"].retrieving.clear()
    blind = window(text).logits[:, -1]
    assert torch.equal(window(between).logits[:, -1], blind)
    assert error_of(window(sink).logits[:, -1], blind) > 1e-4
    assert error_of(blind, want) > 1e-4


def test_a_state_with_a_damaged_store_is_refused(tmp_path: Path) -> None:
    model, path = wrapped("infllm"), tmp_path / "state.safetensors"
    model.read(long_text()).save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    name = "memories.infllm.layers.0.units.store.1.key"
    for damage, words in (
        (lambda t: t.pop(name), "missing or foreign"),
        (lambda t: t.update({name: t[name][..., :3].contiguous()}), "shape"),
        (lambda t: t.update({name.replace(".1.", ".9."): t.pop(name)}), "missing|foreign|lacks"),
    ):
        tensors = load_file(path)
        assert name in tensors
        damage(tensors)
        sums = checksums(tensors, about=metadata["about"])  # as one who edits the file would
        save_file(tensors, tmp_path / "damaged.safetensors", metadata=metadata | sums)
        with pytest.raises(ValueError, match=words):
            memwrap.MemoryState.load(tmp_path / "damaged.safetensors", model)


@torch.no_grad()
def test_a_question_selects_for_its_answer() -> None:
    """All its tokens see the same units, and single tokens behind it what these were."""
    model = wrapped("infllm", selection="question", top_k=2)
    state = model.read(long_text(tokens=48))
    model(long_text(seed=1, tokens=5), cache=state)

    def chosen() -> list[list[int]]:
        layers = state.memories["infllm"]["layers"].values()
        return [tree["chosen"].flatten().tolist() for tree in layers if "chosen" in tree]

    asked = chosen()
    assert all(min(numbers) > 0 for numbers in asked)
    for seed in range(3):
        model(long_text(seed=seed, tokens=1), cache=state)
        assert chosen() == asked
    model.memory_settings("infllm", selection="block")
    found = []
    for seed in range(3, 8):
        model(long_text(seed=seed, tokens=1), cache=state)
        found.append(chosen())
    assert any(numbers != asked for numbers in found)
