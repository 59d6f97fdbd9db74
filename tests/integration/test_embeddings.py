"""What changes a base's embeddings: adapters on them, and tokens that are added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from small import VOCABULARY, llama, word_tokenizer
from support import crossed
from torch import Tensor

import memwrap
from memwrap.backbones import add_token
from memwrap.exporting import merged
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, ids, randomise, tiny, wrapped

TEXT = ids(2, 43)
ADAPTERS: dict[str, Any] = {
    "LoRA": lambda table: LoraConfig(r=4, target_modules=[table, "lm_head"]),
    "a copy": lambda table: LoraConfig(r=4, target_modules=["lm_head"], modules_to_save=[table]),
    "rows": lambda table: LoraConfig(
        r=4, target_modules=["lm_head"], trainable_token_indices={table: [3, 7]}
    ),
}
# Nothing is tied here, or the head that LoRA goes to would share its weight with the table.
TABLES = {"llama": "embed_tokens", "gemma3": "embed_tokens", "gpt2": "wte"}


@torch.no_grad()
def logits(model: Any, text: Tensor = TEXT) -> Tensor:
    return model(text, use_cache=False).logits


def untied(family: str) -> Any:
    base = build(family)
    head = base.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    return base


@pytest.mark.proof("PEFT's adapters on the embeddings: LoRA, rows, a copy", "peft")
@pytest.mark.parametrize("memory", ["rmt", "landmark"])
@pytest.mark.parametrize(("kind", "family"), crossed(list(ADAPTERS), list(TABLES), 1))
def test_an_adapter_on_the_embeddings(kind: str, family: str, memory: str, tmp_path: Path) -> None:
    """It begins with the base, changes it, is saved with the memory and merges into it."""
    model = wrapped(memory, base=untied(family))
    plain = logits(model)
    model.add_lora(ADAPTERS[kind](TABLES[family]))
    assert_close(logits(model), plain)
    torch.manual_seed(0)
    for name, value in model.backbone.named_parameters():
        if value.requires_grad:
            assert ".lora_" in name or "trainable_tokens" in name or "modules_to_save" in name
            value.data += 0.2 * torch.randn_like(value)
    want = logits(model)
    assert error_of(want, plain) > 1e-2
    model.save_pretrained(tmp_path, include_base=False)
    assert torch.equal(logits(memwrap.load(tmp_path, untied(family))), want)
    again = wrapped(memory, base=with_merged(untied(family), model))
    assert_close(logits(again), want)


def with_merged(base: Any, model: Any) -> Any:
    """A base with the weights of a model whose adapters are merged."""
    weights = merged(model)
    prefix = "backbone."
    base.load_state_dict({k[len(prefix) :]: weights[k] for k in weights if k.startswith(prefix)})
    return base


def trained_rows(model: Any, text: Tensor) -> None:
    """Two steps, so that whatever may change does."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(chosen, 1e-2)
    for _ in range(2):
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.filterwarnings("error:The base is not")
@pytest.mark.parametrize("tied", [False, True])
def test_a_landmark_that_is_a_token(tied: bool, tmp_path: Path) -> None:
    """Added to tokenizer and embeddings, trained beside LoRA, saved with the adapter alone."""
    base, tokenizer = llama(), word_tokenizer()
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    table = base.get_input_embeddings().weight.detach().clone()
    head = base.get_output_embeddings().weight.detach().clone()
    index = add_token(base, tokenizer, "<landmark>")
    assert index == VOCABULARY == tokenizer.convert_tokens_to_ids("<landmark>")
    assert add_token(base, tokenizer, "<landmark>") == index  # once is enough
    assert_close(base.get_input_embeddings().weight[index], table.mean(0), 1e-6)
    assert_close(base.get_output_embeddings().weight[index], head.mean(0), 1e-6)
    assert torch.equal(base.get_input_embeddings().weight[:index], table)

    text = ids(2, 43) % VOCABULARY
    model = memwrap.wrap(base, tiny("landmark", landmark_id=index))
    own = wrapped("landmark", base=type(base).from_pretrained(tmp_path / "base"))
    own.memories["landmark"].token.data[:] = table.mean(0)
    assert_close(logits(model, text)[..., :index], logits(own, text))  # the same, with one more id

    model.add_lora(LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[index]))
    trained_rows(model, text)
    assert error_of(model.backbone.get_input_embeddings().weight[index], table.mean(0)) > 1e-2
    want = logits(model, text)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "model.safetensors").stat().st_size < 20_000
    other = type(base).from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="65 ids, the given base 64"):  # it is the caller's
        memwrap.load(tmp_path / "adapter", other)
    assert other.get_input_embeddings().weight.shape[0] == VOCABULARY
    add_token(other, tokenizer, "<landmark>")
    for given in (None, tmp_path / "base", other):
        assert torch.equal(logits(memwrap.load(tmp_path / "adapter", given), text), want)
    other = type(base).from_pretrained(tmp_path / "base")
    add_token(other, tokenizer, "<landmark>")
    again = memwrap.wrap(with_merged(other, model), tiny("landmark", landmark_id=index))
    assert_close(logits(again, text), want)


def test_tokens_of_a_base_that_has_room_for_them() -> None:
    """Where the table is larger than the tokenizer, ids are taken from the room that is there."""
    base, tokenizer = llama(), word_tokenizer()
    base.resize_token_embeddings(VOCABULARY + 8)
    before = base.get_input_embeddings().weight.detach().clone()
    assert add_token(base, tokenizer, "<one>") == VOCABULARY
    assert torch.equal(base.get_input_embeddings().weight, before)
    randomise(memwrap.wrap(base, tiny("rmt")))
