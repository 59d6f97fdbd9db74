"""AutoCompressor: drawn lengths, reusable summaries, positions; segments by themselves (ICAE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import assert_pieces_and_padding

import memwrap
from memwrap.backbones.adapters import lora_disabled
from memwrap.engine.plan import draw_lengths
from memwrap.exporting import export
from memwrap.memories.autocompressor import AutoCompressorConfig
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_states,
    error_of,
    ids,
    padded,
    shifted,
    wrapped,
)

NAME = "autocompressor"
TEXT = ids(2, 6 * SEGMENT + 3)


def lengths_of(model: Any, text: torch.Tensor = TEXT, **kwargs: Any) -> list[list[int]]:
    """Tokens of each row in each step of a call in training, as the backbone is given them."""
    loop = model.train().loop()
    planned: list[list[int]] = []
    loop_call = type(loop)._plan

    def watched(self: Any, inputs: Any, state: Any) -> Any:
        groups = loop_call(self, inputs, state)
        planned[:] = [(s.columns >= 0).sum(1).tolist() for _, steps in groups for s in steps]
        return groups

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(loop), "_plan", watched)
        model(text, labels=text, **kwargs)
    return planned


@pytest.mark.parametrize("window", [2, 3, None])
@pytest.mark.parametrize("spread", [1 / 3, 1.0])
def test_drawn_lengths_keep_their_promises(window: int | None, spread: float) -> None:
    config = AutoCompressorConfig(
        segment_size=12, num_memory_tokens=2, memory_size=4, bptt_segments=window,
        length_spread=spread,
    )  # fmt: skip
    for total in (24, 36, 60, 65):
        drawn = [draw_lengths(config, total) for _ in range(50)]
        for lengths in drawn:
            assert lengths is not None and sum(lengths) == total
            whole = lengths[: total // 12]
            assert len(lengths) == -(-total // 12) and max(whole) <= config.longest_segment
            assert min(whole) >= 2 and lengths[len(whole) :] == [total % 12] * (total % 12 > 0)
            for first in range(0, len(whole), window or len(whole)):
                part = whole[first : first + (window or len(whole))]
                assert sum(part) == 12 * len(part)  # gradients stop where they always stop
        assert len({tuple(d) for d in drawn if d}) > 5
        seen = {n for d in drawn if d for n in d[: total // 12]}
        assert min(seen) <= 9 and max(seen) >= 15  # however many segments a window has
    assert draw_lengths(config, 12) is None and draw_lengths(config, 5) is None
    two = AutoCompressorConfig(segment_size=12, length_spread=1 / 3)
    seen = {n for _ in range(300) for n in draw_lengths(two, 24) or []}
    assert seen == set(range(8, 17))  # the published bounds: from 2/3 to 4/3


def test_training_draws_and_evaluation_does_not() -> None:
    model = wrapped(NAME, length_spread=1 / 3, bptt_segments=2)
    torch.manual_seed(3)
    first = lengths_of(model)
    torch.manual_seed(3)
    assert lengths_of(model) == first  # torch's generator decides
    assert any(lengths_of(model) != first for _ in range(5))
    assert all(row == rows[0] for rows in first for row in rows)  # rows of one length share it
    assert [sum(r[0] for r in first[i : i + 2]) for i in (0, 2, 4)] == [2 * SEGMENT] * 3
    assert first[6] == [3, 3]
    state = torch.get_rng_state()
    with torch.no_grad():
        got = model.eval()(TEXT).logits
        assert torch.equal(torch.get_rng_state(), state), "evaluation drew a number"
        want = wrapped(NAME)(TEXT).logits
    assert_close(got, want, 1e-6)
    read = model.train().read(TEXT)  # nor does reading, whatever the mode
    assert_same_states(read, wrapped(NAME).read(TEXT), 1e-6)


def test_what_training_draws_is_what_it_computes() -> None:
    """Loss and logits are those of the same segments read one by one."""
    model = wrapped(NAME, length_spread=1 / 3).train()
    torch.manual_seed(3)
    lengths = [step[0] for step in lengths_of(model)]
    assert len(set(lengths)) > 2
    torch.manual_seed(3)
    out = model(TEXT, labels=TEXT, return_logits=True)
    reader = wrapped(NAME, segment_size=2 * SEGMENT)
    state, targets, pieces, start, loss = reader.new_state(2), shifted(TEXT), [], 0, 0.0
    with torch.no_grad():
        for length in lengths:
            part = slice(start, start + length)
            pieces.append(reader(TEXT[:, part], cache=state.clone()).logits)
            one = reader(
                TEXT[:, part], shift_labels=targets[:, part], cache=state,
                num_items_in_batch=int((targets != -100).sum()),
            )  # fmt: skip
            state, loss = reader.close_segment(one.cache), loss + one.loss
            start += length
    assert out.loss.item() == pytest.approx(float(loss), rel=1e-5)
    assert_close(out.logits, torch.cat(pieces, 1))


def test_gradient_checkpointing_repeats_what_was_drawn() -> None:
    grads = []
    for checkpointing in (False, True):
        model = wrapped(NAME, length_spread=1 / 3).train()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(3)
        model(TEXT, labels=TEXT).loss.backward()
        grads.append(model.memories[NAME].tokens.grad)
    assert_close(grads[1], grads[0], 1e-6)


def test_rows_of_different_lengths_are_drawn_apart() -> None:
    model = wrapped(NAME, length_spread=1 / 3)
    text, mask = padded([TEXT[0], TEXT[1, : 3 * SEGMENT]], "left")
    torch.manual_seed(1)
    rows = list(zip(*lengths_of(model, text, attention_mask=mask), strict=True))
    assert [sum(row) for row in rows] == [TEXT.shape[1], 3 * SEGMENT]
    assert max(map(max, rows)) <= SEGMENT * 4 // 3


# Summaries


def test_summaries_are_soft_prompts(tmp_path: Path) -> None:
    """Read a corpus once, save it, and put several documents in front of a question."""
    model = wrapped(NAME, memory_size=12)
    memory, question = model.memories[NAME], ids(1, 5, seed=9)
    documents = [ids(1, n, seed=n) for n in (SEGMENT, 2 * SEGMENT + 3, 4)]
    for index, document in enumerate(documents):
        model.close_segment(model.read(document)).save(tmp_path / f"{index}.safetensors")
    states = [
        memwrap.MemoryState.load(tmp_path / f"{i}.safetensors", model) for i in (2, 0, 1)
    ]  # any order
    joined = memory.combine(states)
    assert int(joined.segments) == 5 and int(joined.tokens_seen) == 4 + 8 + 19
    vectors = torch.cat([memory.summaries(s)[0] for s in states])
    assert torch.equal(memory.summaries(joined)[0], vectors) and vectors.shape[0] == 10
    with torch.no_grad():
        got = model(question, cache=joined.clone()).logits
        embeds = model.get_input_embeddings()(question)
        want = model.backbone(inputs_embeds=torch.cat([vectors[None], embeds], 1)).logits[:, 10:]
    assert_close(got, want)
    answer = model.generate(
        question, cache=joined, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert answer[0, 5] == got[0, -1].argmax() and answer.shape == (1, 9)
    alone = model.generate(question, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert alone[0, 5:].tolist() != answer[0, 5:].tolist()


def test_combining_rows() -> None:
    model = wrapped(NAME, memory_size=8)
    memory = model.memories[NAME]
    left = model.close_segment(model.read([ids(1, 3)[0], ids(1, 2 * SEGMENT, seed=1)[0]]))
    right = model.close_segment(model.read(ids(2, SEGMENT, seed=2)))
    joined = memory.summaries(memory.combine([left, right]))
    assert [len(v) for v in joined] == [4, 6]
    for row, vectors in enumerate(joined):
        parts = [memory.summaries(s)[row] for s in (left, right)]
        assert torch.equal(vectors, torch.cat(parts))


def test_what_cannot_be_combined_says_why() -> None:
    model = wrapped(NAME)
    memory = model.memories[NAME]
    closed = model.read(ids(1, 2 * SEGMENT))
    with pytest.raises(ValueError, match="empty list"):
        memory.combine([])
    with pytest.raises(ValueError, match="close_segment"):
        memory.combine([model.read(ids(1, 3))])
    with pytest.raises(ValueError, match=r"8 summaries.*`memory_size` is 5"):
        memory.combine([closed, closed])
    with pytest.raises(ValueError, match=r"\[1, 2\] rows"):
        memory.combine([closed, model.read(ids(2, SEGMENT))])
    with pytest.raises(ValueError, match="different models"):
        memory.combine([closed, wrapped(NAME, segment_size=9).read(ids(1, 9))])
    with pytest.raises(ValueError, match="at most 5"):
        memory.prompt(torch.zeros(1, 6, 32))


def test_the_oldest_summaries_go_first() -> None:
    model = wrapped(NAME)  # room for five, two a segment
    memory, state, seen = model.memories[NAME], model.new_state(1), []
    for part in ids(1, 4 * SEGMENT).split(SEGMENT, 1):
        state = model.read(part, state=state)
        seen.append(memory.summaries(state)[0][-2:])
    assert torch.equal(memory.summaries(state)[0], torch.cat(seen)[-5:])
    last = wrapped(NAME, accumulate=False)
    vectors = last.memories[NAME].summaries(last.read(ids(1, 4 * SEGMENT)))[0]
    assert vectors.shape[0] == 2


# Positions


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_summaries_take_no_position_of_a_learned_table(family: str) -> None:
    """What the layers are given: summaries as they are, tokens with positions from 0."""
    base = build(family)
    got: list[torch.Tensor] = []
    text = ids(1, 2 * SEGMENT)
    tables = [m for n, m in base.named_modules() if n.endswith(("wpe", "embed_positions"))]
    layers = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList))
    with torch.no_grad():
        model = wrapped(NAME, base=base)
        handle = layers[0].register_forward_pre_hook(lambda _, args: got.append(args[0]))
        state = model.read(text[:, :SEGMENT])
        vectors = model.memories[NAME].summaries(state)[0]
        model(text[:, SEGMENT:], cache=state)
        handle.remove()
        # The positions that the family itself gives a text of a segment's length.
        offset = tables[0].num_embeddings - base.config.max_position_embeddings
        own = model.get_input_embeddings()(text[:, SEGMENT:])[0]
        own = own + tables[0].weight[offset : offset + SEGMENT]
    first, second = got
    assert first.shape[1] == SEGMENT + 2 and second.shape[1] == 2 + SEGMENT + 2
    assert_close(second[0, :2], vectors, 1e-6)
    assert_close(second[0, 2:-2], own, 1e-6)
    assert_close(second[0, -2:], model.memories[NAME].tokens, 1e-6)
    shifted_on = wrapped(NAME, base=memwrap.unwrap(model), zero_positions=False)
    with torch.no_grad():
        assert error_of(shifted_on(text).logits, model_logits(family, text)) > 1e-3


def model_logits(family: str, text: torch.Tensor) -> torch.Tensor:
    return wrapped(NAME, family)(text).logits


def test_positions_added_behind_a_projection_are_refused() -> None:
    base = build("opt", word_embed_proj_dim=16)
    with torch.no_grad():
        with pytest.raises(ValueError, match="`zero_positions` must be false"):
            wrapped(NAME, base=base)(ids(1, 2 * SEGMENT))
        plain = wrapped(NAME, base=base, zero_positions=False)
        assert bool(plain(ids(1, 2 * SEGMENT)).logits.isfinite().all())


def test_a_table_limits_tokens_not_summaries() -> None:
    model = wrapped(NAME, "gpt2", memory_size=200, segment_size=64)
    with torch.no_grad():
        assert bool(model(ids(1, 5 * 64)).logits.isfinite().all())
    with pytest.raises(ValueError, match="64"):
        wrapped(NAME, "gpt2", memory_size=200, segment_size=16, zero_positions=False)
    with pytest.raises(ValueError, match="at most"):
        wrapped(NAME, "gpt2", segment_size=60, length_spread=1 / 3)


# ICAE: every segment by itself, read without adapters

ICAE: dict[str, Any] = {"independent": True, "reader": "frozen"}


def with_lora(family: str = "llama", **settings: Any) -> Any:
    """A model whose adapters, and memory, are random: everything matters."""
    model = wrapped(NAME, family, **settings)
    model.add_lora(peft.LoraConfig(r=2, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_slots_are_made_with_adapters_and_read_without(family: str) -> None:
    """Both passes, run by hand on the backbone: `[segment | tokens]` with the adapters, `[slots of
    all segments before | segment]` without; rotary positions count through the slots."""
    model, text = with_lora(family, **ICAE), ids(1, 3 * SEGMENT)
    memory: Any = model.memories[NAME]
    tokens = memory.tokens[None]
    parts = [model.parts.embed(part) for part in text.split(SEGMENT, 1)]

    def alone(embeds: torch.Tensor) -> torch.Tensor:
        return model.parts.run(embeds, torch.arange(embeds.shape[1])[None])

    with torch.no_grad():
        got, state = model(text).logits, model.read(text)
        slots = [alone(torch.cat([part, tokens], 1))[:, -2:] for part in parts]
        with lora_disabled(model.backbone):
            seen = [torch.cat([*slots[:n], part], 1) for n, part in enumerate(parts)]
            want = [model.parts.head(alone(x)[:, -SEGMENT:]) for x in seen]
            plain = model.backbone(text[:, :SEGMENT]).logits
    assert_close(got, torch.cat(want, 1), 1e-5)
    assert_close(got[:, :SEGMENT], plain, 1e-5)  # adapters or not, a first segment is the base's
    # Five places for three segments' two slots: the oldest is gone.
    assert_close(memory.summaries(state)[0], torch.cat(slots, 1)[0, 1:], 1e-5)
    with torch.no_grad():
        both = with_lora(family, independent=True)(text).logits
    assert error_of(both, got) > 1e-2


def test_slots_do_not_depend_on_what_was_read_before() -> None:
    model, text = with_lora(**ICAE), ids(1, 2 * SEGMENT)
    memory: Any = model.memories[NAME]
    last = memory.summaries(model.read(text))[0][-2:]
    assert_close(last, memory.summaries(model.read(text[:, SEGMENT:]))[0], 1e-5)


@pytest.mark.parametrize("settings", [ICAE, {"independent": True}, {**ICAE, "accumulate": False}])
def test_pieces_and_padding_of_independent_segments(settings: dict[str, Any]) -> None:
    assert_pieces_and_padding(with_lora(**settings))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_learn_from_what_their_slots_are_worth(checkpointing: bool) -> None:
    """A first segment teaches them nothing; the second does, through its slots alone."""
    model = with_lora(**ICAE).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    text = ids(2, 2 * SEGMENT)
    labels = text.clone()
    labels[:, SEGMENT + 1 :] = -100
    adapters = {n: p for n, p in model.backbone.named_parameters() if "lora_" in n}
    for labelled, learns in ((labels, False), (text, True)):
        model.zero_grad()
        loss = model(text, labels=labelled).loss
        if loss.requires_grad:
            loss.backward()
        grads = [p.grad for p in adapters.values() if p.grad is not None]
        most = max((float(g.abs().max()) for g in grads), default=0.0)
        assert (most > 1e-6) is learns, most


@pytest.mark.slow
def test_what_is_on_in_one_pass_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads without them.*save_pretrained"):
        export(with_lora(**ICAE), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()
    export(wrapped(NAME, **ICAE), tmp_path / "out")  # without adapters there is one model
