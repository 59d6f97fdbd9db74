"""Memory Decoder: its network beside transformers', its window, the mixture, other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.memories.parts.small_decoder import DecoderShape, SmallDecoder
from memwrap.ops.interpolation import interpolate_logits
from memwrap.state.trees import tree_leaves
from memwrap.testing.families import VOCABULARY, build
from memwrap.testing.helpers import assert_close, error_of, ids, wrapped

TEXT = ids(2, 23)
LAYERS = 3


def other(layers: int = LAYERS, **settings: Any) -> Any:
    """A model of the decoder's form, with grouped heads and tied embeddings."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=layers, intermediate_size=24,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.3, rms_norm_eps=1e-6, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def decoder_of(model: Any, layers: int = LAYERS, window: int = 64) -> SmallDecoder:
    shape = DecoderShape(VOCABULARY, 16, layers, 4, 2, 24, window, 10_000.0, 1e-6)
    decoder = SmallDecoder(shape, torch.float64, torch.device("cpu"))
    decoder.take_over(model.get_decoder().state_dict())
    return decoder


# transformers computes norms and angles in float32, whatever the weights are: 4e-7 was seen.
FLOAT32 = 3e-6


@torch.no_grad()
def test_it_is_the_model_whose_weights_it_takes_over() -> None:
    model = other()
    decoder, want = decoder_of(model), model(TEXT).logits
    assert_close(decoder.head(decoder.text(TEXT)), want, FLOAT32)
    padded = torch.cat([torch.full((2, 3), -1), TEXT], 1)
    assert_close(decoder.head(decoder.text(padded))[:, 3:], want, FLOAT32)


@pytest.mark.parametrize("window", [1, 2, 7])
@torch.no_grad()
def test_a_text_in_pieces_is_the_text_whole(window: int) -> None:
    """With padding anywhere, in a state of as many tokens as the window has behind the newest."""
    decoder = decoder_of(other(), window=window)
    want = decoder.text(TEXT)
    state, found = decoder.empty(2, TEXT.device), []
    assert state["there"].shape == (2, window - 1)
    for piece in TEXT.split([4, 1, 1, 9, 8], 1):
        holes = torch.full((2, 2 * piece.shape[1] + 1), -1)
        holes[:, 1::2] = piece
        hidden, state = decoder(holes, state)
        found.append(hidden[:, 1::2])
    assert_close(torch.cat(found, 1), want, 1e-12)
    nothing, same = decoder(TEXT[:, :0], state)
    assert nothing.shape == (2, 0, 16)
    assert all(torch.equal(t, dict(tree_leaves(state))[n]) for n, t in tree_leaves(same))


@torch.no_grad()
def test_the_window_ends() -> None:
    decoder = decoder_of(other(), window=4)
    changed = TEXT.clone()
    changed[:, 5] = (changed[:, 5] + 17) % 100 + 3
    moved = (decoder.text(changed) - decoder.text(TEXT)).abs().amax((0, 2)) > 1e-9
    # Every layer reaches three tokens further.
    assert moved.nonzero().squeeze(1).tolist() == list(range(5, 5 + 3 * LAYERS + 1))


@torch.no_grad()
def test_mixing_by_hand() -> None:
    model = wrapped("memory_decoder", interpolation=0.3, temperature=2.0)
    memory, plain = model.memories["memory_decoder"], model.backbone(TEXT).logits
    # The backbone reads segments of 8, the decoder goes on over them.
    off = model(TEXT, memory_control="off").logits
    assert_close(off[:, :8], plain[:, :8])
    own = memory.decoder.head(memory.decoder.text(TEXT)) / 2.0
    want = (0.7 * off.softmax(-1) + 0.3 * own.softmax(-1)).log()
    got = model(TEXT).logits
    assert_close(got.log_softmax(-1), want)
    assert_close(got.logsumexp(-1), off.logsumexp(-1))
    model.memory_settings("memory_decoder", interpolation=0.0)
    assert torch.equal(model(TEXT).logits, off)


def test_what_one_of_two_models_does_not_know() -> None:
    logits, few, many = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3, 7)
    got = interpolate_logits(logits, few, 0.25).softmax(-1)
    want = 0.75 * logits.softmax(-1)
    want[:, :4] += 0.25 * few.softmax(-1)
    assert_close(got, want)
    cut = interpolate_logits(logits, many[:, :5], 0.25)
    assert torch.equal(interpolate_logits(logits, many, 0.25), cut)


@torch.no_grad()
def test_it_begins_with_some_layers_of_the_backbone() -> None:
    model = other(5).float()
    settings: dict[str, Any] = {
        "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "inner_size": 24, "segment_size": 8,
    }  # fmt: skip
    taken = memwrap.wrap(model, memwrap.MemoryDecoderConfig(num_layers=3, **settings))
    memory: Any = taken.memories["memory_decoder"]
    memory.start_from(model)
    for number, layer in zip((0, 2, 4), memory.decoder.layers, strict=True):
        want = model.model.layers[number].mlp.up_proj.weight
        assert torch.equal(layer.mlp.up_proj.weight, want)
    wider: Any = memwrap.wrap(other(5).float(), memwrap.MemoryDecoderConfig(hidden_size=32))
    with pytest.raises(ValueError, match=r"has shape \(128, 16\); the decoder needs \(128, 32\)"):
        wider.memories["memory_decoder"].start_from(model)
    with pytest.raises(ValueError, match="is missing"):
        memory.start_from(build("gpt2"))


@torch.no_grad()
def test_its_weights_serve_another_backbone(tmp_path: Any) -> None:
    """Of any family and width, with the same vocabulary."""
    model, another = wrapped("memory_decoder"), wrapped("memory_decoder", "gpt2")
    weights = model.memories["memory_decoder"].state_dict()
    another.memories["memory_decoder"].load_state_dict(weights)
    key, again = (m.memories["memory_decoder"].decoder.text(TEXT) for m in (model, another))
    assert torch.equal(key, again)
    assert error_of(model(TEXT).logits, another(TEXT).logits) > 1e-2
