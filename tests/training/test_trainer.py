"""MemoryTrainer: streaming equals one call, its rates, its curriculum, resuming."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import crossed
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.testing.helpers import checkpointed
from memwrap.training.arguments import MemoryTrainingArguments, parse_curriculum
from memwrap.training.batches import shifted_labels
from memwrap.training.collating import DocumentCollator
from memwrap.training.reducing import average_gradients
from memwrap.training.trainer import MemoryTrainer

SEGMENT = 8
VOCABULARY = 61


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


OWN: dict[str, dict[str, Any]] = {
    "armt": {"d_mem": 8, "value_init": "normal"},
    "hmt": {"num_sensory": 2, "cache_size": 3, "d_mem": 8},
    "autocompressor": {"memory_size": 5, "length_spread": 0.0},
    "memoryprompt": {"memory_size": 16, "mlp_size": 12},
}


def wrapped(name: str = "rmt", **settings: Any) -> memwrap.MemoryModelForCausalLM:
    """A tiny model whose memory matters from the start."""
    own: dict[str, Any] = {} if name == "hmt" else {"num_memory_tokens": 2}
    own |= OWN.get(name, {})
    base = llama()
    torch.manual_seed(1)
    return memwrap.wrap(base, name, **{"segment_size": SEGMENT} | own | settings)


class Documents(Dataset):
    """Random documents of the given lengths."""

    def __init__(self, lengths: list[int], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


def make_trainer(
    model: nn.Module, folder: Path, lengths: list[int] | None = None, **settings: Any
) -> MemoryTrainer:
    data = settings.pop("train_dataset", Documents(lengths or [20, 33, 9, 41]))
    keywords = {k: settings.pop(k) for k in ("eval_dataset", "compute_metrics") if k in settings}
    settings = {
        "per_device_train_batch_size": 2, "save_strategy": "no", "logging_steps": 1,
        "learning_rate": 1e-2, "max_grad_norm": 0.0,
    } | settings  # fmt: skip
    args = MemoryTrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    return MemoryTrainer(model, args, train_dataset=data, **keywords)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        difference = (got[name] - value).abs().max().item()
        assert difference <= tolerance * max(value.abs().max().item(), 1e-8), name


def left_padded(lengths: list[int]) -> dict[str, Tensor]:
    batch = DocumentCollator()([Documents(lengths)[i] for i in range(len(lengths))])
    order = [torch.arange(max(lengths)).roll(max(lengths) - n) for n in lengths]
    return {k: v.gather(1, torch.stack(order)) for k, v in batch.items()}


# Arguments


def test_curriculum_is_parsed(tmp_path: Path) -> None:
    assert parse_curriculum("0:2, 500:4,1000:8") == [(0, 2), (500, 4), (1000, 8)]
    args = MemoryTrainingArguments(output_dir=str(tmp_path), segment_curriculum="0:2,5:4")
    assert [args.segments_at(s) for s in (0, 4, 5, 900)] == [2, 2, 4, 4]
    assert MemoryTrainingArguments(output_dir=str(tmp_path)).segments_at(3) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "STEP:SEGMENTS"),
        ("0:2,", "STEP:SEGMENTS"),
        ("0:two", "'0:two'"),
        ("0", "STEP:SEGMENTS"),
        ("0:-1", "STEP:SEGMENTS"),
        ("0:2:3", "STEP:SEGMENTS"),
        ("0:0", "at least 1"),
        ("5:2", "start at step 0"),
        ("0:2,9:4,9:8", "steps must increase"),
    ],
)
def test_bad_curriculum_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryTrainingArguments(output_dir=str(tmp_path), segment_curriculum=text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_learning_rate": -1.0}, "memory_learning_rate"),
        ({"memory_weight_decay": -0.1}, "memory_weight_decay"),
        ({"vary_segments": True}, "segment_curriculum"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryTrainingArguments(output_dir=str(tmp_path), **settings)


def test_varied_segments_repeat_by_seed_and_step(tmp_path: Path) -> None:
    def draws(seed: int) -> list[int | None]:
        args = MemoryTrainingArguments(
            output_dir=str(tmp_path), segment_curriculum="0:3,40:8", vary_segments=True, seed=seed
        )
        return [args.segments_at(step) for step in range(200)]

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert set(first[:40]) == {1, 2, 3}
    assert set(first[40:]) == set(range(1, 9))


# Streaming


@pytest.mark.parametrize(
    ("name", "options"),
    crossed(
        ["rmt", "armt", "hmt", "autocompressor", "memoryprompt"],
        [(1, "all"), (1, "last"), (2, "last"), (2, "all")], 2,
    ),
)  # fmt: skip
def test_streaming_gradients_equal_the_single_call(
    tmp_path: Path, name: str, options: tuple[int, str]
) -> None:
    window, loss_on = options
    model = wrapped(name, bptt_segments=window, loss_on=loss_on).train()
    trainer = make_trainer(model, tmp_path)
    batch = left_padded([41, 8, 30, 17])
    items = torch.tensor(57)

    model(**batch, num_items_in_batch=items).loss.backward()
    want = gradients(model)
    with torch.no_grad():
        loss = model(**batch, num_items_in_batch=items).loss
    model.zero_grad()
    got = trainer.training_step(model, batch, items)
    assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    # Recall's gradients are small differences of vectors that are nearly equal before training.
    assert_close(gradients(model), want, 1e-4 if name == "hmt" else 1e-5)
    # The truncation is real: the whole graph gives other gradients.
    full = wrapped(name, loss_on=loss_on, bptt_segments=None).train()
    full(**batch, num_items_in_batch=items).loss.backward()
    other = gradients(full)["memory_modules." + name + ".tokens"]
    assert not torch.allclose(other, want["memory_modules." + name + ".tokens"], rtol=1e-2)


def test_streaming_with_embeddings_and_checkpointing(tmp_path: Path) -> None:
    model = wrapped("armt", bptt_segments=2).train()
    trainer = make_trainer(model, tmp_path)
    batch = left_padded([41, 22])
    model(**batch).loss.backward()
    want = gradients(model)
    items = (shifted_labels(batch) != -100).sum() - 1  # the first token of the padded row
    model.zero_grad()
    checkpointed(model)
    trainer.training_step(model, batch, items)
    assert_close(gradients(model), want)
    model.zero_grad()
    with torch.no_grad():
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    trainer.training_step(model, batch, items)
    want.pop("backbone.model.embed_tokens.weight")
    assert_close(gradients(model), want)


def kept_for_backward(model: nn.Module, step: Any) -> int:
    """The most bytes that a step keeps for a backward pass at once."""
    current = peak = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal current, peak
        current += tensor.numel() * tensor.element_size()
        peak = max(peak, current)
        return tensor

    def start(*_: Any) -> None:
        nonlocal current
        current = 0

    handle = model.register_forward_pre_hook(start)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    handle.remove()
    return peak


def test_streaming_keeps_no_more_for_a_longer_document(tmp_path: Path) -> None:
    model = wrapped("armt", bptt_segments=2)
    peaks = {}
    for streaming in (True, False):
        trainer = make_trainer(model, tmp_path, streaming=streaming)
        for segments in (4, 16):
            batch = left_padded([segments * SEGMENT])
            peaks[streaming, segments] = kept_for_backward(
                model, lambda t=trainer, b=batch: t.training_step(model, b, torch.tensor(9))
            )
    assert peaks[True, 16] == peaks[True, 4]
    assert peaks[False, 16] > 3 * peaks[False, 4] > 3 * peaks[True, 4]


def test_pieces_without_targets_run_without_a_graph(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=1, loss_on="last")
    trainer = make_trainer(model, tmp_path)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (torch.is_grad_enabled(), tuple(kwargs["input_ids"].shape))
        ),
        with_kwargs=True,
    )
    trainer.training_step(model, left_padded([24, 12]), torch.tensor(9))
    # The short row ends in the second piece and is not read further.
    assert seen == [(False, (2, 8)), (True, (2, 8)), (True, (1, 8))]


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    results = []
    for rows, accumulated, streaming in ((4, 1, True), (1, 4, True), (4, 1, False)):
        model = wrapped("armt", bptt_segments=2)
        trainer = make_trainer(
            model, tmp_path, per_device_train_batch_size=rows, streaming=streaming, max_steps=1,
            gradient_accumulation_steps=accumulated, optim="sgd", learning_rate=0.5,
        )  # fmt: skip
        trainer.train()
        loss = trainer.state.log_history[0]["loss"]
        results.append(({n: p.detach() for n, p in model.named_parameters()}, loss))
    fresh = dict(wrapped("armt").named_parameters())
    for parameters, loss in results[1:]:
        assert loss == pytest.approx(results[0][1], rel=1e-5)
        for name, value in parameters.items():
            assert torch.allclose(value, results[0][0][name], atol=1e-6), name
    assert not torch.equal(
        results[0][0]["memory_modules.armt.tokens"], fresh["memory_modules.armt.tokens"]
    )


def test_without_a_count_the_mean_is_divided_by_the_accumulation(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=1).train()
    trainer = make_trainer(model, tmp_path)
    trainer.current_gradient_accumulation_steps = 4
    batch = left_padded([20, 20])
    model(**batch).loss.backward()
    want = {n: g / 4 for n, g in gradients(model).items()}
    model.zero_grad()
    trainer.training_step(model, batch, None)
    assert_close(gradients(model), want)


def test_bfloat16_autocast_streams_like_one_call(tmp_path: Path) -> None:
    losses = []
    for streaming in (True, False):
        trainer = make_trainer(
            wrapped("armt", bptt_segments=2), tmp_path, bf16=True, max_steps=3,
            streaming=streaming, torch_empty_cache_steps=1,
        )  # fmt: skip
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0][-1] < losses[0][0] < 1.2 * math.log(VOCABULARY)


def test_no_targets_give_no_nan(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=1)
    trainer = make_trainer(model, tmp_path)
    batch = left_padded([20, 20])
    batch["labels"].fill_(-100)
    assert trainer.training_step(model, batch, torch.tensor(0)).item() == 0
    assert not gradients(model)


@pytest.mark.parametrize("settings", [{"alignment": "right"}, {"count_padding": True}])
def test_streaming_yields_to_settings_that_cut_elsewhere(tmp_path: Path, settings: dict) -> None:
    model = wrapped("rmt", bptt_segments=2, loss_on="last", **settings).train()
    trainer = make_trainer(model, tmp_path)
    batch = left_padded([41, 30])
    model(**batch).loss.backward()
    want = gradients(model)
    model.zero_grad()
    prepared = trainer.prepare_batch(batch)
    items = (shifted_labels(prepared) != -100).sum()
    trainer.training_step(model, batch, items)
    assert_close(gradients(model), want)


# Curriculum and loss


@pytest.mark.parametrize("streaming", [True, False])
def test_norms_of_states_are_logged_and_saved(tmp_path: Path, streaming: bool) -> None:
    model = wrapped("armt", bptt_segments=2)
    trainer = make_trainer(model, tmp_path / "run", [40], streaming=streaming, learning_rate=0.0,
                           max_steps=3, logging_steps=1)  # fmt: skip
    trainer.train()
    norms = model.state_norms(model.read(trainer.train_dataset.rows[0][None]))["armt"]  # type: ignore[union-attr]
    want = {str(layer): pytest.approx(float(norm), 1e-5) for layer, norm in norms.items()}
    assert model.config.trained_norms == {"armt": want}
    rows = [row for row in trainer.state.log_history if "loss" in row]
    largest = max(model.config.trained_norms["armt"].values())
    assert [row["armt.state_norm"] for row in rows] == [largest] * 3
    model.save_pretrained(tmp_path / "saved", include_base=True)
    again = memwrap.load(tmp_path / "saved")
    assert again.config.trained_norms == model.config.trained_norms
    other = wrapped("rmt", bptt_segments=2)
    make_trainer(other, tmp_path / "other", [40], max_steps=1).train()
    assert other.config.trained_norms is None


def test_curriculum_trims_to_the_first_segments(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=1)
    trainer = make_trainer(
        model, tmp_path, [40, 21, 30, 7], segment_curriculum="0:1,2:3", max_steps=4,
        per_device_train_batch_size=4, lr_scheduler_type="constant", learning_rate=0.0,
    )  # fmt: skip
    steps: list[list[int]] = []
    original = trainer.training_step

    def training_step(model: nn.Module, inputs: dict, items: Tensor) -> Tensor:
        steps.append(sorted(inputs["attention_mask"].sum(1).tolist()))
        # Every target that is left is counted, and no other.
        assert items == (inputs["labels"][:, 1:] != -100).sum()
        return original(model, inputs, items)

    trainer.training_step = training_step
    trainer.train()
    assert steps == [[7, 8, 8, 8]] * 2 + [[7, 21, 24, 24]] * 2
    want = []
    for length in (SEGMENT, 3 * SEGMENT):
        rows = [{"input_ids": row[:length]} for row in trainer.train_dataset.rows]
        with torch.no_grad():
            want.append(model.eval()(**DocumentCollator()(rows)).loss.item())
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses == pytest.approx([want[0], want[0], want[1], want[1]], rel=1e-4)


def test_loss_on_last_is_the_mean_over_last_segments(tmp_path: Path) -> None:
    model = wrapped("rmt", bptt_segments=2, loss_on="last")
    trainer = make_trainer(
        model, tmp_path, [21, 30], max_steps=1, learning_rate=0.0,
        eval_dataset=Documents([21, 30]), per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    with torch.no_grad():
        batch = DocumentCollator()([trainer.train_dataset[0], trainer.train_dataset[1]])
        want = model.eval()(**batch).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-4)


# Evaluation


def test_evaluation_reads_whole_documents_and_keeps_no_logits(tmp_path: Path) -> None:
    model = wrapped("armt")
    data = Documents([40, 23])
    trainer = make_trainer(
        model, tmp_path, eval_dataset=data, per_device_eval_batch_size=1,
        segment_curriculum="0:1",
    )  # fmt: skip
    outputs = []
    model.register_forward_hook(lambda _, args, out: outputs.append(out))
    result = trainer.evaluate()["eval_loss"]
    assert [(o.logits, o.cache) for o in outputs] == [(None, None)] * 2
    with torch.no_grad():
        want = [model(row["input_ids"][None], labels=row["input_ids"][None]).loss for row in data]
    assert result == pytest.approx(sum(want).item() / 2, rel=1e-5)


def test_metrics_get_logits_on_request(tmp_path: Path) -> None:
    model = wrapped("armt")
    shapes = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"x": 1.0}

    trainer = make_trainer(
        model, tmp_path, eval_dataset=Documents([20, 20]), compute_metrics=metrics,
        prediction_loss_only=False,
    )  # fmt: skip
    assert trainer.evaluate()["eval_x"] == 1.0
    assert shapes == [(2, 20, VOCABULARY)]


# Optimizer


def test_memory_has_its_own_rate_and_decay(tmp_path: Path) -> None:
    model = wrapped("armt")
    trainer = make_trainer(
        model, tmp_path, learning_rate=1e-3, weight_decay=0.1, memory_learning_rate=1e-2,
        memory_weight_decay=0.3,
    )  # fmt: skip
    optimizer = trainer.create_optimizer()
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert found["memory_modules.armt.tokens"] == (1e-2, 0.3)
    assert found["memory_modules.armt.layers.0.value.weight"] == (1e-2, 0.3)
    assert found["memory_modules.armt.layers.0.beta.bias"] == (1e-2, 0.0)
    assert found["backbone.model.layers.0.mlp.up_proj.weight"] == (1e-3, 0.1)
    assert found["backbone.model.norm.weight"] == (1e-3, 0.0)


def test_a_memory_may_ask_for_its_own_groups(tmp_path: Path) -> None:
    model = wrapped("armt")
    model.backbone.requires_grad_(False)
    memory = model.memories["armt"]
    memory.optimizer_groups = lambda: [{"params": [memory.tokens], "lr": 0.5}]
    trainer = make_trainer(model, tmp_path, memory_learning_rate=1e-2, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert all(group["params"] for group in groups)
    own = next(g for g in groups if g["params"][0] is memory.tokens)
    assert (own["lr"], own["weight_decay"], len(own["params"])) == (0.5, 0.1, 1)
    assert {g["lr"] for g in groups if g is not own} == {1e-2}
    assert sum(len(g["params"]) for g in groups) == len(list(model.memory_parameters()))


def test_rates_are_left_alone_by_default(tmp_path: Path) -> None:
    trainer = make_trainer(wrapped(), tmp_path)
    assert len(trainer.create_optimizer().param_groups) == 2


# Resuming


def losses_of(trainer: MemoryTrainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_resume_repeats_the_run(
    tmp_path: Path, lora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    from peft import LoraConfig

    def trainer(folder: str, steps: int) -> MemoryTrainer:
        model = wrapped("armt", bptt_segments=1)
        if lora:
            model.add_lora(LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))
        else:
            model.backbone.requires_grad_(False)
        return make_trainer(
            model, tmp_path / folder, [40, 17, 33, 25, 20, 38], max_steps=steps, save_steps=3,
            save_strategy="steps", lr_scheduler_type="constant", segment_curriculum="0:2,4:5",
            vary_segments=True, memory_learning_rate=2e-2,
        )  # fmt: skip

    straight = trainer("straight", 6)
    straight.train()
    first = trainer("resumed", 3)
    first.train()
    second = trainer("resumed", 6)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        second.train(resume_from_checkpoint=True)
    assert not [r for r in caplog.records if "missing keys" in r.getMessage()]
    assert len(losses_of(straight)) == 6
    assert losses_of(second) == losses_of(straight)
    assert losses_of(first) == losses_of(straight)[:3]
    for (name, got), (_, want) in zip(
        second.model.named_parameters(), straight.model.named_parameters(), strict=True
    ):
        assert torch.equal(got, want), name
    # The checkpoint holds what was trained and not the backbone.
    size = (tmp_path / "resumed" / "checkpoint-3" / "model.safetensors").stat().st_size
    assert size < sum(p.numel() for p in second.model.backbone.parameters()) * 4


def test_a_checkpoint_without_trained_weights_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    trainer = make_trainer(wrapped("rmt"), tmp_path)
    said = []
    monkeypatch.setattr(
        Trainer, "_issue_warnings_after_load", lambda self, result: said.append(result)
    )
    trainer.model.backbone.requires_grad_(False)
    trainer._issue_warnings_after_load(trainer.model.load_state_dict({}, strict=False))
    assert said[0].missing_keys == ["memory_modules.rmt.tokens"]


# What is refused


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match=r"memwrap\.wrap"):
        make_trainer(llama(), tmp_path)
    with pytest.raises(TypeError, match="MemoryTrainingArguments"):
        MemoryTrainer(wrapped(), TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(wrapped(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="prediction_loss_only"):
        make_trainer(wrapped(), tmp_path, compute_metrics=lambda p: {})
    args = MemoryTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="streaming=False"):
        MemoryTrainer(wrapped(bptt_segments=1), args, compute_loss_func=lambda *a, **k: None)
    trainer = make_trainer(wrapped(bptt_segments=1), tmp_path)
    batch = left_padded([20, 12])
    batch["attention_mask"][0, 5] = 0
    with pytest.raises(ValueError, match="hole"):
        trainer.training_step(trainer.model, batch, torch.tensor(9))


# Several processes (more in tests/integration/test_processes.py)


def test_average_gradients_of_one_process(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        model = nn.Linear(3, 2)
        model.weight.grad = torch.ones(2, 3)
        average_gradients(model)
        assert torch.equal(model.weight.grad, torch.ones(2, 3))
        assert model.bias.grad is None
    finally:
        torch.distributed.destroy_process_group()


def test_the_window_is_left_out_less_and_less(tmp_path: Path) -> None:
    model = memwrap.wrap(llama(), "liger", segment_size=SEGMENT)
    memory, shares = model.memories["liger"], []
    weights = memory._weights

    def watched(read: Tensor) -> Any:
        shares.append(memory.drawn_branch)
        return weights(read)

    memory._weights = watched
    settings = {"window_dropout": 0.8, "window_dropout_end": 0.0}
    make_trainer(model, tmp_path, max_steps=4, **settings).train()
    assert {branch for branch, _ in shares} == {"recurrent"}
    assert sorted({share for _, share in shares}) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    for wrong in ({"window_dropout": 1.1}, {"window_dropout_end": -0.1}):
        with pytest.raises(ValueError, match="from 0 to 1"):
            make_trainer(model, tmp_path, **wrong)
    other = memwrap.wrap(llama(), "rmt", segment_size=SEGMENT)
    with pytest.raises(ValueError, match="liger has"):
        make_trainer(other, tmp_path, window_dropout=0.5)
