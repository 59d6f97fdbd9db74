"""Distillation: the loss, where the teacher comes from, and training in pieces."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor

from memwrap.engine.inputs import Teacher
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, gradients, ids, wrapped
from memwrap.testing.helpers import assert_same_gradients as assert_same
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.distillation import teacher_of
from memwrap.training.trainer import MemoryTrainer


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) `(B, T)`, from probabilities, times temperature squared."""
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    return (p * (p.log() - q.log())).sum(-1) * temperature**2


def batch_of(rows: int = 2, tokens: int = 3 * SEGMENT + 3) -> dict[str, Tensor]:
    text = ids(rows, tokens)
    labels = text.clone()
    labels[0, 2:5] = -100
    return {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": labels}


def trainer_of(model: Any, folder: Path, **settings: Any) -> MemoryTrainer:
    args = MemoryTrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True,
        save_strategy="no", per_device_train_batch_size=2, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    return MemoryTrainer(model, args, train_dataset=[{"input_ids": ids(20)}])


@pytest.mark.parametrize("name", ["armt", "liger", "knnlm"])
def test_the_loss_is_cross_entropy_and_divergence(name: str) -> None:
    """Against the formula, on tokens that have a target; also where logits are mixed."""
    model = wrapped(name).eval()
    batch = batch_of()
    text, labels = batch["input_ids"], batch["labels"]
    hidden = torch.randn(*text.shape, model.parts.config.hidden_size)
    with torch.no_grad():
        logits = model(text).logits
        taught = model.parts.head(hidden)
        loss = model(text, labels=labels, teacher=Teacher(hidden, 0.7, 2.0)).loss
        alone = model(text, labels=labels, teacher=Teacher(hidden, 0.7, 2.0, labels=0.0)).loss
        plain = model(text, labels=labels).loss
    targets = labels[:, 1:]
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
    apart = divergence(logits, taught, 2.0)[:, :-1][targets != -100].mean()
    assert float(plain) == pytest.approx(float(entropy), rel=1e-5)
    assert float(loss) == pytest.approx(float(entropy + 0.7 * apart), rel=1e-5)
    assert float(alone) == pytest.approx(float(0.7 * apart), rel=1e-4)
    assert float(apart) > 0.01


def test_the_teacher_is_the_backbone_as_it_was() -> None:
    """Without LoRA, with its own softmax, in evaluation mode; nothing stays switched off."""
    base = build("llama").eval()
    model = wrapped("liger", base=copy.deepcopy(base))
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    model.add_lora(lora)
    model.train()
    batch = batch_of()
    teacher = teacher_of(model, batch, 1.0, 1.0)
    with torch.no_grad():
        want = base(batch["input_ids"]).logits
        got = model.parts.head(teacher.hidden)
        own = model.eval()(batch["input_ids"]).logits
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(own, want, atol=1e-2)
    model.train()
    teacher_of(model, batch, 1.0, 1.0)
    assert model.backbone.training
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora" in n)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)


def test_streaming_gives_the_gradients_of_one_call(tmp_path: Path) -> None:
    model = wrapped("armt", bptt_segments=1).train()
    trainer = trainer_of(model, tmp_path, distillation_weight=0.5, distillation_temperature=2.0)
    batch = batch_of()
    batch["attention_mask"][1, -9:] = 0
    batch["labels"][1, -9:] = -100
    items = torch.tensor(31)
    teacher = teacher_of(model, batch, 0.5, 2.0)
    loss = model(**batch, teacher=teacher, num_items_in_batch=items).loss
    loss.backward()
    want = gradients(model)
    got = trainer.training_step(model, dict(batch), items)
    assert float(got) == pytest.approx(float(loss.detach()), rel=1e-5)
    found = gradients(model)
    assert_same(found, want)
    trainer_of(model, tmp_path).training_step(model, dict(batch), items)
    plain = gradients(model)
    name = max(want, key=lambda n: float(want[n].abs().max()))
    assert not torch.allclose(plain[name], want[name], rtol=1e-2)


@pytest.mark.slow
def test_a_linearized_model_comes_nearer_to_its_softmax() -> None:
    """Some steps of distillation alone halve what keeps the two apart."""
    torch.manual_seed(0)
    model = wrapped("liger", window_size=2)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    reference = copy.deepcopy(model)
    batch = batch_of()

    def apart() -> float:
        with torch.no_grad():
            want = reference.parts.head(teacher_of(reference, batch, 1.0, 1.0).hidden)
            return float(divergence(model(batch["input_ids"]).logits, want, 1.0).mean())

    before = apart()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        # Heavy: the targets are random, and pull elsewhere.
        teacher = teacher_of(reference, batch, 1000.0, 1.0)
        model.train()(**batch, teacher=teacher).loss.backward()
        optimizer.step()
    model.eval()
    assert apart() < 0.5 * before


def test_what_cannot_be_taught_is_refused(tmp_path: Path) -> None:
    model = wrapped("armt")
    limit = model.parts.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"context of {limit} tokens; one has {limit + 1}"):
        teacher_of(model, batch_of(1, limit + 1), 1.0, 1.0)
    with pytest.raises(ValueError, match="distillation_weight"):
        trainer_of(model, tmp_path, distillation_weight=-1.0)
    with pytest.raises(ValueError, match="distillation_temperature"):
        trainer_of(model, tmp_path, distillation_temperature=0.0)
    with pytest.raises(ValueError, match=r"label_weight.*without a distillation"):
        trainer_of(model, tmp_path, label_weight=0.0)
    with pytest.raises(ValueError, match="`label_weight` is -1"):
        trainer_of(model, tmp_path, distillation_weight=1.0, label_weight=-1.0)
    with pytest.raises(ValueError, match="teacher"):
        text = ids(1, 8)
        model(text, labels=text, teacher=torch.zeros(1, 8, 4))
