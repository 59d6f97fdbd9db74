"""TRL's trainers that compare with a reference model, and SFTTrainer with PEFT: as on the base, or
refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from small import SETTINGS, llama, losses_of, word_tokenizer, wrapped

import memwrap
from memwrap.model.memory_model import MEMORY_CHILD

pytestmark = [
    # peft and TRL still use the names that transformers 5.23 replaced.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
TEXTS = [" ".join(f"w{(7 * i + j * j) % 60}" for j in range(20 + i)) for i in range(4)]
PAIRS = {
    "prompt": [text[:40] for text in TEXTS],
    "chosen": [text[40:] for text in TEXTS],
    "rejected": [" w5 w6 w7 w8 w9 w1"] * 4,
}
FOUR = SETTINGS | {"per_device_train_batch_size": 4}


def lora(**given: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **given)


def kept() -> LoraConfig:
    return lora(modules_to_save=[MEMORY_CHILD])


def saved(folder: Path, name: str = "armt", **settings: Any) -> Any:
    """A model that knows where it was loaded from, as TRL wants it."""
    model = wrapped(name, **settings)
    model.save_pretrained(folder, include_base=True)
    return memwrap.load(folder).train()


def dpo(folder: Path, model: Any, reference: Any = None, **given: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(output_dir=str(folder), max_length=None, bf16=False, **FOUR),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=word_tokenizer(),
        **given,
    )
    trainer.train()
    return trainer


def grpo(folder: Path, model: Any, **given: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    torch.manual_seed(5)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(folder), bf16=False, num_generations=2, max_completion_length=10,
            **FOUR, **given.pop("settings", {}),
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": PAIRS["prompt"]}),
        processing_class=word_tokenizer(),
        **given,
    )  # fmt: skip
    trainer.train()
    return trainer


def noted(trainer: Any, *names: str) -> list[float]:
    return [row[n] for row in trainer.state.log_history for n in names if n in row]


@pytest.mark.proof("TRL's DPOTrainer and GRPOTrainer", "trl")
def test_a_window_that_sees_all_learns_preferences_as_its_base(tmp_path: Path) -> None:
    """Segments of 8 tokens, and all of them seen: losses, gradients, rewards are the base's."""
    of_dpo, of_grpo = (
        ("loss", "grad_norm", "logps/chosen", "logps/rejected"), ("loss", "grad_norm", "reward"),
    )  # fmt: skip
    wide = {"name": "window", "window_size": 64, "num_sinks": 0}
    want = noted(dpo(tmp_path, llama(), llama()), *of_dpo)
    got = noted(dpo(tmp_path, wrapped(**wide), wrapped(**wide)), *of_dpo)
    # float32 in another order; the second step's figures depend on the first step's gradients.
    assert len(got) == 8 and got == pytest.approx(want, rel=1e-3)
    want = noted(grpo(tmp_path, llama()), *of_grpo)
    got = noted(grpo(tmp_path, wrapped(**wide)), *of_grpo)
    assert len(got) == 6 and got == pytest.approx(want, rel=1e-3, abs=1e-6)


@pytest.mark.proof("TRL's DPOTrainer and GRPOTrainer", "trl")
def test_preferences_reach_the_memory(tmp_path: Path) -> None:
    model = saved(tmp_path / "model", value_init="normal")
    reference, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    trainer = dpo(tmp_path / "given", copy.deepcopy(model), reference)
    assert losses_of(trainer)[0] == pytest.approx(0.6931472, rel=1e-5)  # log 2: equal models
    assert losses_of(trainer)[1] < 0.66
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    after = trainer.model.state_dict()
    changed = {key for key in before if not torch.equal(after[key], before[key])}
    assert f"{MEMORY_CHILD}.armt.tokens" in changed
    # Without a reference TRL loads the model again from where it came from.
    alone = dpo(tmp_path / "alone", copy.deepcopy(model))
    assert losses_of(alone) == losses_of(trainer)
    divergences = noted(grpo(tmp_path / "grpo", model, settings={"beta": 0.1}), "kl")
    assert divergences[0] == 0 and divergences[1] > 1e-3


@pytest.mark.proof("TRL's DPOTrainer and GRPOTrainer", "trl", "peft")
@pytest.mark.parametrize("train", [dpo, grpo])
def test_preferences_with_peft(tmp_path: Path, train: Any) -> None:
    model = saved(tmp_path / "model", value_init="normal")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = train(tmp_path / "run", model, peft_config=kept())
    found = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    memory = {n for n in found if MEMORY_CHILD in n}
    assert memory and all("lora_" in n for n in found - memory)
    tokens = dict(trainer.model.named_parameters())
    name = next(n for n in memory if n.endswith("armt.tokens"))
    assert not torch.equal(tokens[name], before[f"{MEMORY_CHILD}.armt.tokens"])
    with pytest.warns(UserWarning, match=r"modules_to_save=\['memory_modules'\]"):
        train(tmp_path / "frozen", saved(tmp_path / "again"), peft_config=lora())


@pytest.mark.proof("TRL's SFTTrainer", "trl", "datasets")
def test_sft_with_peft_trains_the_memory_or_says_so(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    def trained(config: LoraConfig) -> Any:
        trainer = SFTTrainer(
            model=wrapped("armt", value_init="normal"),
            args=SFTConfig(output_dir=str(tmp_path), max_length=None, bf16=False, **FOUR),
            train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
            processing_class=word_tokenizer(),
            peft_config=config,
        )
        trainer.train()
        return trainer.model

    with pytest.warns(UserWarning, match="every parameter of the memory is frozen"):
        trained(lora())
    model = trained(kept())
    assert all(p.requires_grad for p in model.get_base_model().memory_parameters())
    start = dict(wrapped("armt", value_init="normal").named_parameters())
    tokens = model.get_base_model().memories["armt"].tokens
    assert not torch.equal(tokens, start[f"{MEMORY_CHILD}.armt.tokens"])


def test_what_their_head_would_leave_out_is_refused() -> None:
    model, ids = wrapped("armt"), torch.arange(3, 23)[None]
    with pytest.raises(ValueError, match="'knnlm' changes the logits"):
        wrapped("knnlm").base_model(ids)  # what newer trainers call; older ones take the logits
    with pytest.raises(ValueError, match="`pixel_values` was given"):
        model.base_model(ids, pixel_values=torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="begins with nothing read"):
        model.base_model(ids, past_key_values=model.read(ids))
    with pytest.raises(ValueError, match="did you mean `inputs_embeds`"):
        model.base_model(ids, input_embeds=ids)
    for called in (model, model.base_model):
        with pytest.raises(ValueError, match="balances experts"):
            called(ids, output_router_logits=True)
    model.backbone.config.output_router_logits = True
    with pytest.warns(UserWarning, match="without the loss that balances"):
        model.train().base_model(ids)
