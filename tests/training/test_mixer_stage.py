"""The first stage of a conversion against its statement with hooks, and all stages in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import crossed
from torch import Tensor

from memwrap.engine.mixer_matching import mixers_matched, softmax_in
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_gradients,
    checkpointed,
    differ,
    error_of,
    gradients,
    ids,
    padded,
    wrapped,
)
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.batches import IGNORED
from memwrap.training.distillation import teacher_of
from memwrap.training.trainer import MemoryTrainer

CONVERSIONS = {
    "liger": {"window_size": 2},
    "lolcats": {"window_size": 2},
    "ahn": {"window_size": 2, "num_sinks": 1},
}


def converted(name: str, family: str = "llama", **settings: Any) -> Any:
    """A conversion with adapters that matter, ready to train."""
    model = wrapped(name, family, **{**CONVERSIONS[name], **settings})
    model.backbone.requires_grad_(False)
    model.add_lora(
        LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    )
    return model.train()


def naive(model: Any, base: Any, text: Tensor) -> float:
    """Error over size of every layer's attention, with what the base's layers are given put into
    the converted model's; one segment, no padding. A mean over layers and rows."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def note(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            seen[number] = kwargs["hidden_states"], out[0]

        return hook

    shares: list[Tensor] = []

    def put(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "hidden_states": seen[number][0]}

        return hook

    def compare(number: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            want = seen[number][1].double()
            error = (out[0].double() - want).square().sum((1, 2))
            shares.append(error / want.square().sum((1, 2)))

        return hook

    handles = [
        layer.self_attn.register_forward_hook(note(n), with_kwargs=True)
        for n, layer in enumerate(base.model.layers)
    ]
    base(text)
    for n, layer in enumerate(model.parts.layers):
        attention = layer.self_attn
        handles.append(attention.register_forward_pre_hook(put(n), with_kwargs=True))
        handles.append(attention.register_forward_hook(compare(n), with_kwargs=True))
    model.eval()(text)
    for handle in handles:
        handle.remove()
    model.train()
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_loss_is_what_layers_miss_of_the_softmax(name: str) -> None:
    model, base, text = converted(name), build("llama").eval(), ids(2, SEGMENT)
    with torch.no_grad():
        want = naive(model, base, text)
        with mixers_matched():
            got = float(model(text, labels=text).loss)
    assert want > 0.01
    assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("name", "side"), crossed(list(CONVERSIONS), ["left", "right"], 1))
def test_padded_batches_equal_single_rows_in_every_stage(name: str, side: str) -> None:
    """Loss and gradients of mixers, logits and text: the mean over tokens of rows alone."""
    model = converted(name)
    rows = [ids(length, seed=length) for length in (2 * SEGMENT + 3, SEGMENT + 1, 5)]
    text, mask = padded(rows, side, 3 * SEGMENT)
    labels = text.masked_fill(mask == 0, IGNORED)

    def stage(kind: str, batch: dict[str, Tensor]) -> Tensor:
        if kind == "logits":
            batch = {**batch, "teacher": teacher_of(model, batch, 1.0, 1.0, 0.0)}
        with mixers_matched(kind == "mixers"):
            return model(**batch).loss

    for kind in ("mixers", "logits", "text"):
        loss = stage(kind, {"input_ids": text, "attention_mask": mask, "labels": labels})
        loss.backward()
        found, total, want = gradients(model), sum(len(r) - 1 for r in rows), 0.0
        for row in rows:
            alone = {"input_ids": row[None], "labels": row[None]}
            part = stage(kind, alone) * ((len(row) - 1) / total)
            part.backward()
            want += float(part.detach())
        assert want > 1e-3
        assert float(loss.detach()) == pytest.approx(want, rel=1e-5), kind
        assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_only_memory_and_adapters_learn_and_every_segment_begins_anew(family: str) -> None:
    model, text = converted("lolcats", family), ids(2, 2 * SEGMENT)
    with mixers_matched():
        out = model(text, labels=text, use_cache=True)
        pieces = text.split(SEGMENT, 1)
        single = [float(model(piece, labels=piece).loss.detach()) for piece in pieces]
    out.loss.backward()
    found = gradients(model)
    assert {n.startswith("memory") or "lora_" in n for n in found} == {True}
    assert any("lora_A" in n for n in found)
    # A segment predicts one token more in the middle of a row than at its end.
    want = (SEGMENT * single[0] + (SEGMENT - 1) * single[1]) / (2 * SEGMENT - 1)
    assert float(out.loss.detach()) == pytest.approx(want, rel=1e-5)
    assert float(out.cache.memories["lolcats"]["layers"]["0"]["S"].abs().max()) == 0
    with torch.no_grad():  # outside of the block all is as it was
        eager = model.eval()(text).logits
        assert error_of(eager, build(family).eval()(text).logits) > 1e-2


def test_recomputed_segments_give_the_same_gradients() -> None:
    text = ids(2, 2 * SEGMENT)
    plain = converted("lolcats")
    again = checkpointed(converted("lolcats"))
    for model in (plain, again):
        torch.manual_seed(0)
        for n, p in model.named_parameters():
            if "lora_" in n:
                torch.nn.init.normal_(p, std=0.1)
        with mixers_matched():
            loss = model(text, labels=text).loss
        loss.backward()
    assert_same_gradients(gradients(again), gradients(plain))


def test_other_layers_take_no_part() -> None:
    model, text = converted("lolcats", layers=[1]), ids(2, SEGMENT)
    with mixers_matched():
        model(text, labels=text).loss.backward()
    found = {n for n, g in gradients(model).items() if float(g.abs().max()) > 0}
    assert found and not any(".layers.0." in n or "maps.0" in n for n in found)


def test_layers_keep_their_softmax_in_a_block() -> None:
    model, text = converted("liger").eval(), ids(2, SEGMENT)
    with torch.no_grad():
        base, all_of_it = build("llama").eval()(text).logits, model(text).logits
        with softmax_in([0, 1], list(model.parts.layers)):
            assert_close(model(text).logits, base, 1e-5)
        with softmax_in([0], list(model.parts.layers)):
            one = model(text).logits
        assert min(error_of(one, base), error_of(one, all_of_it)) > 1e-3
        assert torch.equal(model(text).logits, all_of_it)


def trainer_of(model: Any, folder: Path, **settings: Any) -> MemoryTrainer:
    args = MemoryTrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", **settings,
    )  # fmt: skip
    return MemoryTrainer(model, args, train_dataset=[{"input_ids": ids(20)}])


def test_the_trainer_trains_mixers_and_evaluates_text(tmp_path: Path) -> None:
    model, text = converted("ahn"), ids(2, SEGMENT)
    trainer = trainer_of(model, tmp_path, mixer_matching=True)
    batch = {"input_ids": text, "labels": text, "attention_mask": torch.ones_like(text)}
    with mixers_matched():
        want = float(model(text, labels=text).loss.detach())
    items = torch.tensor(2 * SEGMENT - 2)
    got = trainer.training_step(model, dict(batch), items)
    assert float(got) == pytest.approx(want, rel=1e-5)
    mixers = gradients(model)
    trainer_of(model, tmp_path).training_step(model, dict(batch), items)
    assert differ(gradients(model), mixers)
    with torch.no_grad():
        language = float(model.eval()(text, labels=text).loss)
        got = trainer.prediction_step(model, dict(batch), True)[0]
    assert float(got) == pytest.approx(language, rel=1e-5)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_error_comes_down(name: str) -> None:
    torch.manual_seed(0)
    model, text, losses = converted(name), ids(4, SEGMENT), []
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        with mixers_matched():
            loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_what_has_no_mixers_to_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rmt does not; use liger"):
        trainer_of(wrapped("rmt"), tmp_path, mixer_matching=True)
    with pytest.raises(ValueError, match="teacher, would move"):
        trainer_of(wrapped("lolcats"), tmp_path, mixer_matching=True)
    bare = wrapped("liger")
    bare.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        trainer_of(bare, tmp_path, mixer_matching=True)
    with pytest.raises(ValueError, match="makes no logits"):
        trainer_of(converted("ahn"), tmp_path, mixer_matching=True, distillation_weight=1.0)
    model, text = converted("ahn"), ids(1, 5)
    state = model.read(text)
    with mixers_matched(), pytest.raises(ValueError, match="one is open"):
        model(text, cache=state, labels=text)
