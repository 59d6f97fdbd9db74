"""Infini-attention: what the shared invariants do not ask."""

from __future__ import annotations

import pytest
import torch
from support import assert_pieces_and_padding, crossed

import memwrap
from memwrap.backbones import Backbone
from memwrap.testing.families import FAMILIES, build
from memwrap.testing.helpers import SEGMENT, assert_close, error_of, ids, wrapped

VARIANTS = [{"update": u, "first_segment": f} for u in ("linear", "delta") for f in
            ("local_only", "zero_gated")]  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "family"), crossed(VARIANTS, ["llama", "gemma3", "gpt2", "phi3"], 2)
)
def test_pieces_and_padding(family: str, variant: dict) -> None:
    assert_pieces_and_padding(wrapped("infini", family, **variant))


# gpt2 and opt add learned positions to what is projected.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gpt2", "opt")])
def test_keys_are_unrotated(family: str) -> None:
    """The same tokens at other places of a segment leave the same memory in the first layer."""
    base = build(family)
    model = memwrap.wrap(base, "infini", segment_size=16, layers=[0])
    first = ids(1, 6)
    sizes = model.memories["infini"].sizes.attention[0]
    with torch.no_grad():
        tree = [
            model.close_segment(model.read(torch.cat([first] * n, 1))).memories["infini"]
            for n in (1, 2)
        ]
    z = [t["layers"]["0"]["z"] for t in tree]
    assert z[0].shape == (1, sizes.num_kv_heads, sizes.key_dim)
    # In layer 0 a key is a function of its token alone once the rotation is taken back.
    assert_close(z[1], 2 * z[0], 1e-5)


def test_gates_have_their_own_optimizer_group() -> None:
    model = wrapped("infini", "llama")
    (group,) = model.memories["infini"].optimizer_groups()
    assert group["lr"] == 1e-2 and group["weight_decay"] == 0.0
    assert [p.shape for p in group["params"]] == [(4,), (4,)]


def test_figures_are_the_gates() -> None:
    model = memwrap.wrap(build("llama"), "infini", gate_init=0.0)
    figures = model.memories["infini"].figures()
    assert figures["gate"].tolist() == [[0.5] * 4] * 2


def test_zero_gated_scales_the_first_segment() -> None:
    base, text = build("llama"), ids(1, SEGMENT)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, "infini", segment_size=SEGMENT, first_segment="zero_gated")
        assert error_of(model(text).logits, want) > 1e-3
        model.memories["infini"].gates["0"].fill_(-20.0)
        model.memories["infini"].gates["1"].fill_(-20.0)
        assert_close(model(text).logits, want, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_model(family: str) -> None:
    base = build(family)
    modes = [m.training for m in base.modules()]
    before = base.config._attn_implementation
    parts = Backbone(base)
    found = parts.attention_sizes()
    assert list(found) == [0, 1]  # recurrent layers have none
    sizes = found.values()
    width = 6 if family == "deepseek_v2" else 8
    assert all(s.num_heads == 4 and s.key_dim == 8 and s.value_dim == width for s in sizes)
    assert all(s.plain_softmax for s in sizes)
    expected = 4 if family in ("gpt_neox", "gpt2", "opt", "deepseek_v2") else 2
    assert all(s.num_kv_heads == expected for s in sizes)
    rotated = {"gpt2": [False] * 2, "opt": [False] * 2, "smollm3": [True, False]}
    assert [parts.rotary.rotates(n) for n in found] == rotated.get(family, [True] * 2)
    # Looking leaves no trace.
    assert [m.training for m in base.modules()] == modes and not parts.attached
    assert base.config._attn_implementation == before


def test_scaled_and_partial_rotation() -> None:
    """yarn scales what it rotates and gpt_neox rotates a part of the head: both are undone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 16}  # fmt: skip
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    model = memwrap.wrap(base, "infini", segment_size=12, layers=[0])
    first = ids(1, 6)
    with torch.no_grad():
        z = [
            model.close_segment(model.read(torch.cat([first] * n, 1)))
            .memories["infini"]["layers"]["0"]["z"]
            for n in (1, 2)
        ]  # fmt: skip
    assert_close(z[1], 2 * z[0], 1e-5)


def test_a_changed_attention_is_noticed() -> None:
    model = wrapped("infini", "llama")
    model.backbone.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="no longer meets the memory"):
        model(ids(1, 4))


def test_one_backbone_two_memories() -> None:
    base = build("llama")
    memwrap.wrap(base, "infini")
    with pytest.raises(ValueError, match="inside another memory model"):
        memwrap.wrap(base, "window")
