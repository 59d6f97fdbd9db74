"""Trainers of the ecosystem on a memwrap model: transformers, TRL, PEFT around it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small import SETTINGS, documents, llama, losses_of, word_tokenizer, wrapped
from transformers import (
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import memwrap
from memwrap.model.memory_model import MEMORY_CHILD
from memwrap.testing.helpers import assert_close
from memwrap.training.arguments import MemoryTrainingArguments
from memwrap.training.collating import DocumentCollator
from memwrap.training.trainer import MemoryTrainer

pytestmark = [
    # peft and TRL still use the names that transformers 5.23 replaced.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    # peft 0.20 says so of a base without a name.
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.proof("transformers' own Trainer", "accelerate")
@pytest.mark.parametrize("name", ["rmt", "armt"])
def test_stock_trainer_trains_evaluates_and_reloads(tmp_path: Path, name: str) -> None:
    model = wrapped(name)
    data = documents([30, 21, 17, 26])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path / "run"), **SETTINGS),
        data_collator=DocumentCollator(),
        train_dataset=data,
        eval_dataset=data,
    )
    with torch.no_grad():
        batch = DocumentCollator()(data)
        before = model.eval()(**batch).loss.item()
    # One batch of 8 rows holds all: the mean over documents is the loss of the batch.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    trainer.train()
    assert len(losses_of(trainer)) == 2
    trainer.save_model(str(tmp_path / "model"))
    again = memwrap.load(tmp_path / "model")  # the backbone was trained, so it is in there
    with torch.no_grad():
        want, got = model.eval()(batch["input_ids"]), again(batch["input_ids"])
        after = model(**batch).loss.item()
    assert torch.equal(want.logits, got.logits)
    assert after < before


@pytest.mark.proof("transformers' own Trainer", "accelerate")
def test_stock_trainer_accumulates_like_one_batch(tmp_path: Path) -> None:
    results = []
    for rows, accumulated in ((4, 1), (1, 4)):
        model = wrapped("rmt")
        settings = SETTINGS | {
            "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0,
            "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated,
        }  # fmt: skip
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **settings),
            data_collator=DocumentCollator(),
            train_dataset=documents([30, 21, 9, 26]),
        )
        trainer.train()
        results.append((losses_of(trainer)[0], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], atol=1e-6), name


@pytest.mark.proof("transformers' own Trainer", "accelerate")
@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16_full_eval": True}], ids=str)
def test_stock_trainer_measures_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    model, seen = wrapped("armt").eval(), {}
    batch = DocumentCollator()(documents([20, 20]))
    want = model(batch["input_ids"]).logits.detach()

    def measure(predicted: Any) -> dict[str, float]:
        seen["logits"] = torch.as_tensor(predicted.predictions)
        return {}

    trainer = Trainer(
        model=model, args=TrainingArguments(str(tmp_path), **SETTINGS | settings),
        data_collator=DocumentCollator(), eval_dataset=documents([20, 20]),
        compute_metrics=measure, preprocess_logits_for_metrics=lambda logits, labels: logits + 1,
    )  # fmt: skip
    trainer.evaluate()
    error = (seen["logits"] - 1 - want).abs().max() / want.abs().max()
    assert error < (0.05 if settings else 1e-5)


def test_seq2seq_trainer_predicts_with_generate(tmp_path: Path) -> None:
    model, ids = wrapped("armt"), torch.arange(3, 23).view(2, 10)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=14,
        per_device_eval_batch_size=2, use_cpu=True, report_to=[],
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    got = Seq2SeqTrainer(model=model, args=args).predict(rows)
    want = model.generate(ids, max_length=14)
    assert want.shape == (2, 14)  # the trainer pads to the length in the model's settings
    assert torch.equal(torch.from_numpy(got.predictions)[:, :14], want)
    assert got.metrics["test_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.proof("transformers' own Trainer", "accelerate")
def test_label_smoothing_is_that_of_the_base(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 63).view(3, 20)]
    settings = SETTINGS | {"max_steps": 1, "per_device_train_batch_size": 3}
    losses = []
    for model in (llama(), wrapped("window", window_size=64, num_sinks=0)):
        args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **settings)
        trainer = Trainer(model=model, args=args, train_dataset=rows)
        trainer.train()
        losses += losses_of(trainer)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert repr(model).startswith("MemoryModelForCausalLM(")


@pytest.mark.proof("TRL's SFTTrainer", "trl", "datasets")
def test_sft_loss_equals_ours(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    texts = [" ".join(f"w{(7 * i + j * j) % 60}" for j in range(20 + i)) for i in range(4)]
    model = wrapped("armt", value_init="normal")
    reference = copy.deepcopy(model.state_dict())
    settings = SETTINGS | {"per_device_train_batch_size": 4, "max_grad_norm": 0.0}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_length=None, bf16=False, **settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        want = model(
            input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"),
            labels=batch["labels"],
        ).loss.item()  # fmt: skip
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(want, rel=1e-4)
    assert losses[1] < losses[0]
    # The memory took part: its parameters learn, and without it the loss is another.
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, reference[k])]
    assert f"{MEMORY_CHILD}.armt.tokens" in changed
    assert f"{MEMORY_CHILD}.armt.layers.0.value.weight" in changed
    other = wrapped("armt", value_init="normal", segment_size=64).eval()
    with torch.no_grad():
        one = other(
            **{k: batch[k] for k in ("input_ids", "attention_mask", "labels") if k in batch}
        )
    assert abs(one.loss.item() - want) > 1e-3


@pytest.mark.proof("transformers' packing collator", "transformers")
@pytest.mark.parametrize("ours", [False, True])
def test_packed_documents_train_as_rows_do(tmp_path: Path, ours: bool) -> None:
    """transformers' packing collator beside a padded batch of the same documents."""
    results = []
    settings = SETTINGS | {
        "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "per_device_train_batch_size": 4
    }  # fmt: skip
    for collator in (DocumentCollator(), DataCollatorWithFlattening()):
        model = wrapped("armt", bptt_segments=2, value_init="normal")
        kind, arguments = (MemoryTrainer, MemoryTrainingArguments) if ours else (
            Trainer, TrainingArguments
        )  # fmt: skip
        trainer = kind(
            model=model, args=arguments(output_dir=str(tmp_path), **settings),
            data_collator=collator, train_dataset=documents([30, 5, 9, 26]),
            eval_dataset=documents([30, 5, 9, 26]),
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert losses_of(trainer)[0] == pytest.approx(before, rel=1e-5)
        results.append((losses_of(trainer)[0], model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, value in results[0][1].items():
        assert torch.allclose(value, results[1][1][name], atol=1e-6), name


@pytest.mark.proof("TRL's packing", "trl")
def test_sft_packs(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    lengths = (20, 9, 14, 30)
    texts = [" ".join(f"w{(7 * n + j * j) % 60}" for j in range(n)) for n in lengths]
    model = wrapped("landmark", block_size=4)
    settings = SETTINGS | {"per_device_train_batch_size": 2, "max_steps": 1}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_length=48, packing=True, bf16=False, **settings
        ),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=word_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["position_ids"] == 0).sum() == len(lengths) and len(batch["input_ids"]) == 1
    with torch.no_grad():
        rows = batch["input_ids"][0].split(batch["position_ids"][0].eq(0).nonzero().diff(
            dim=0, append=torch.tensor([[batch["input_ids"].shape[1]]])).flatten().tolist()
        )  # fmt: skip
        alone = [model(r[None], labels=r[None], num_items_in_batch=1).loss.item() for r in rows]
    trainer.train()
    want = sum(alone) / sum(len(r) - 1 for r in rows)
    assert losses_of(trainer)[0] == pytest.approx(want, rel=1e-5)


def peft_around(model: Any, dora: bool = False) -> Any:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=[MEMORY_CHILD], use_dora=dora
    )
    return get_peft_model(model, config)


@pytest.mark.proof("`get_peft_model` with LoRA and DoRA", "peft")
@pytest.mark.parametrize(("dora", "streaming"), [(False, True), (False, False), (True, True)])
def test_peft_around_trains_memory_and_adapters(
    tmp_path: Path, dora: bool, streaming: bool
) -> None:
    model = peft_around(wrapped("armt", bptt_segments=2, value_init="normal"), dora)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = MemoryTrainingArguments(
        output_dir=str(tmp_path / "run"), streaming=streaming, memory_learning_rate=3e-2, **SETTINGS
    )
    trainer = MemoryTrainer(model, args, train_dataset=documents([40, 21, 17, 26]))
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert changed == trainable
    memory = {n for n in changed if MEMORY_CHILD in n}
    assert any("magnitude" in n for n in changed) == dora
    assert any(n.endswith("tokens") for n in memory)
    assert all("lora_" in n for n in changed - memory)
    rates = {
        name: group["lr"]
        for group in trainer.optimizer.param_groups
        for name, p in model.named_parameters()
        if any(p is q for q in group["params"])
    }
    # Gates of late layers move faster than what they let through.
    assert {n: rates[n] for n in memory} == {n: 0.6 if "gate" in n else 3e-2 for n in memory}
    assert {rates[n] for n in changed - memory} == {1e-2}


def test_peft_that_reaches_into_the_memory_is_said_and_not_saved(tmp_path: Path) -> None:
    """What PEFT put there trains; the memory itself does not, and its folder could not hold it."""
    model, ids = wrapped("armt", value_init="normal"), torch.arange(3, 23)[None]
    around = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="every parameter of the memory is frozen"):
        around(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match=r"reached into the memory \(armt\..*modules_to_save"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    want = around.eval()(input_ids=ids).logits
    around.merge_and_unload().save_pretrained(tmp_path / "merged", include_base=True)
    assert_close(memwrap.load(tmp_path / "merged")(ids).logits, want, 1e-5)
    both = LoraConfig(r=2, target_modules="all-linear", modules_to_save=[MEMORY_CHILD])
    kept = get_peft_model(wrapped("armt"), both).base_model.model
    kept.save_pretrained(tmp_path / "kept", include_base=True)
    assert torch.equal(memwrap.load(tmp_path / "kept")(ids).logits, kept.eval()(ids).logits)


@pytest.mark.slow
@pytest.mark.proof("`get_peft_model` with LoRA and DoRA", "peft")
@pytest.mark.parametrize("dora", [False, True])
def test_peft_around_saves_and_resumes(tmp_path: Path, dora: bool) -> None:
    from peft import PeftModel

    def trainer(folder: str, steps: int) -> MemoryTrainer:
        settings = SETTINGS | {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        args = MemoryTrainingArguments(output_dir=str(tmp_path / folder), **settings)
        model = peft_around(wrapped("armt", bptt_segments=2), dora)
        return MemoryTrainer(model, args, train_dataset=documents([40, 21, 17, 26, 33, 12]))

    straight = trainer("straight", 4)
    straight.train()
    trainer("resumed", 2).train()
    resumed = trainer("resumed", 4)
    resumed.train(resume_from_checkpoint=True)
    assert losses_of(resumed) == losses_of(straight)

    again = PeftModel.from_pretrained(wrapped("armt"), tmp_path / "straight" / "checkpoint-4")
    batch = DocumentCollator()(documents([40, 21]))
    with torch.no_grad():
        want = straight.model.eval()(**batch).loss
        assert torch.equal(again.eval()(**batch).loss, want)
        assert not torch.equal(wrapped("armt").eval()(**batch).loss, want)


def test_lora_inside_trains_saves_and_loads(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=2)
    model.add_lora(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = MemoryTrainingArguments(output_dir=str(tmp_path / "run"), **SETTINGS)
    trainer = MemoryTrainer(model, args, train_dataset=documents([40, 21, 17, 26]))
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n or MEMORY_CHILD in n}
    trainer.save_model(str(tmp_path / "model"))
    again = memwrap.load(tmp_path / "model", llama())
    ids = documents([30])[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


class Rows(torch.utils.data.IterableDataset):
    """The documents in their order."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.mark.proof("`datasets` streaming as training data", "datasets")
def test_a_streamed_data_set_trains_like_its_rows(tmp_path: Path) -> None:
    """A file is read line by line while training goes on: nothing is downloaded or cached."""
    rows = documents([40, 21, 17, 26, 33, 12, 30, 9])
    text = "".join(json.dumps({"ids": row["input_ids"].tolist()}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    streamed = datasets.load_dataset(
        "json", data_files=str(tmp_path / "rows.jsonl"), split="train", streaming=True
    ).rename_column("ids", "input_ids")
    assert isinstance(streamed, datasets.IterableDataset)
    losses = []
    for data in (streamed, Rows(rows)):
        args = MemoryTrainingArguments(
            output_dir=str(tmp_path / "run"), **SETTINGS | {"max_steps": 6}
        )
        trainer = MemoryTrainer(wrapped("armt", bptt_segments=2), args, train_dataset=data)
        trainer.train()
        losses.append(losses_of(trainer))
    assert len(losses[0]) == 6 and losses[0] == losses[1]
