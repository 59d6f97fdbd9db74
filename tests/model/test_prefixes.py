"""States as prefixes that PEFT loads, and prefixes of PEFT as states."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import refused
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, ids, wrapped

# PEFT asks transformers by a name that this will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]
WHOLE: dict[str, Any] = {
    "segment_size": 8, "memory_size": None, "num_sinks": 2, "reference_every": 2, "slots": 5,
}  # fmt: skip


def logits_of(model: Any, text: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(text, **given).logits


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite", "gpt_neox"])
def test_a_compacted_document_is_loaded_by_peft(family: str, tmp_path: Path) -> None:
    """Slots keep their true places, far before the prefix's length; and back again. The families
    also have norms of keys, a scale of their own, and a part of the channels turned."""
    base = build(family)
    alone, tail = copy.deepcopy(base), ids(2, 9, seed=5)
    model = memwrap.wrap(base, "compact", **WHOLE, bias_bound=0)
    state = model.compact(model.read(ids(1, 60)), 7)
    want = logits_of(model, tail, cache=state.repeat(2))
    for kind in ("CARTRIDGE", "PREFIX_TUNING"):
        model.save_prefix(state, tmp_path / kind, kind=kind)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(alone), tmp_path / kind)
        assert_close(logits_of(loaded, tail), want, 1e-5)
        again = model.load_prefix(tmp_path / kind)
        assert again.tokens_seen.tolist() == [2 + 7]
        assert_close(logits_of(model, tail, cache=again.repeat(2)), want, 1e-5)


def test_a_cartridge_of_peft_is_read(tmp_path: Path) -> None:
    """Made there; it goes on like any state: read behind, compacted, saved."""
    base = build("llama")
    alone, tail = copy.deepcopy(base), ids(1, 20, seed=5)
    config = peft.CartridgeConfig(num_virtual_tokens=6, num_frozen_tokens=1, task_type="CAUSAL_LM")
    made = peft.get_peft_model(alone, config)
    made.save_pretrained(tmp_path)
    model = memwrap.wrap(base, "compact", **WHOLE)
    state = model.load_prefix(tmp_path)
    assert_close(logits_of(model, tail, cache=state.clone()), logits_of(made, tail), 1e-5)
    state.save(tmp_path / "state.safetensors")
    loaded = memwrap.MemoryState.load(tmp_path / "state.safetensors", model)
    assert torch.equal(logits_of(model, tail, cache=loaded), logits_of(model, tail, cache=state))
    small = model.compact(model.read(tail, state=model.load_prefix(tmp_path)), 7)
    tree = small.memories["compact"]["layers"]["0"]
    assert tree["slot_count"].tolist() == [[7, 7]] and tree["sink_count"].tolist() == [2]


def test_a_learned_prefix_goes_in_stays_and_comes_out(tmp_path: Path) -> None:
    """Persistent memory: prefix tuning of PEFT, trained there, is read before every segment however
    much follows, and is the same prefix again."""
    base, text = build("llama"), ids(1, 40, seed=6)
    alone, count = copy.deepcopy(base), 5
    config = peft.PrefixTuningConfig(num_virtual_tokens=count, task_type="CAUSAL_LM")
    made = peft.get_peft_model(alone, config)
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        optimizer.zero_grad()
        made(text, labels=text).loss.backward()
        optimizer.step()
    made.eval().save_pretrained(tmp_path / "given")
    given = load_file(tmp_path / "given" / "adapter_model.safetensors")["prompt_embeddings"]
    whole = memwrap.wrap(base, "compact", **{**WHOLE, "num_sinks": count}).eval()
    state = whole.load_prefix(tmp_path / "given")
    got = logits_of(whole, text, cache=state)
    assert_close(got, logits_of(made, text), 1e-5)
    assert float((got - logits_of(whole, text)).abs().max()) > 1e-3  # it matters
    # In a memory of fixed size the prefix is its sinks, which nothing replaces.
    memwrap.unwrap(whole)
    small = memwrap.wrap(base, "compact", segment_size=8, memory_size=8, num_sinks=count, slots=4)
    first = small.load_prefix(tmp_path / "given")
    last = small.read(text, state=first)
    trees = [s.memories["compact"]["layers"] for s in (first, last)]
    for layer, tree in trees[0].items():
        kept = {n: x for n, x in tree.items() if n.startswith("sink")}
        assert kept and tree["sink_count"].tolist() == [count]
        assert all(torch.equal(trees[1][layer][n], x) for n, x in kept.items())
    small.save_prefix(first, tmp_path / "made", kind="PREFIX_TUNING")
    back = load_file(tmp_path / "made" / "adapter_model.safetensors")["prompt_embeddings"]
    assert_close(back, given, 1e-5)


def test_what_cannot_be_a_prefix_is_refused(tmp_path: Path) -> None:
    model = wrapped("compact", **WHOLE)
    state = model.read(ids(2, 60))
    with refused("2 rows", "one text"):
        model.save_prefix(state, tmp_path)
    one = state.select(torch.tensor([0]))
    with refused("biases", "bias_bound=0"):
        model.save_prefix(model.compact(one, 7), tmp_path)
    with refused("0 to 0 rows"):
        model.save_prefix(model.new_state(1), tmp_path)
    with refused("'LORA'", "PREFIX_TUNING"):
        model.save_prefix(one, tmp_path, kind="LORA")
    assert not any(tmp_path.iterdir())
    model.save_prefix(one, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    about, tensors = json.loads(config.read_text()), load_file(weights)
    config.write_text(json.dumps({**about, "peft_type": "LORA"}))
    with refused("'LORA'"):
        model.load_prefix(tmp_path)
    config.write_text(json.dumps(about))
    right = tensors["prompt_embeddings"]
    for wrong in (right[:, :-1], torch.full_like(right, torch.nan), right.long(),
                  right.to(torch.complex64)):  # fmt: skip
        save_file({"prompt_embeddings": wrong.contiguous()}, weights)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            model.load_prefix(tmp_path)
    save_file({"prompt_embeddings": right[:-1].contiguous()}, weights)
    with refused("60 tokens", "59"):
        model.load_prefix(tmp_path)
    save_file({"prompt_embeddings": torch.full_like(right, 1e5)}, weights)
    with refused("float16", "not finite"):
        wrapped("compact", base=build("llama").half(), **WHOLE).load_prefix(tmp_path)
    weights.write_bytes(b"no tensors")
    with refused("damaged"):
        model.load_prefix(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
        model.load_prefix(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {}, "table of learned positions"),
        ("mistral", {}, "window of their own"),
        ("llama", {"layers": [1]}, "no slots"),
    ],
)
def test_models_without_room_for_a_prefix(
    family: str, changes: dict, words: str, tmp_path: Path
) -> None:
    model = wrapped("compact", family, **{**WHOLE, **changes})
    with refused(words):
        model.save_prefix(model.read(ids(1, 20)), tmp_path)
    with refused(words):
        model.load_prefix(tmp_path)
