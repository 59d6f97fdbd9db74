"""Rotations of every kind at the attention place: measured at wrap, right or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from support import assert_pieces_and_padding
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import memwrap
from memwrap.backbones.backbone import Backbone
from memwrap.state.trees import tree_leaves
from memwrap.testing import families
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, ids, tiny, wrapped

LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "neighbours, a part": ("GlmConfig", {"head_dim": 8}),
    "neighbours, some layers": (
        "Cohere2Config",
        {"head_dim": 8, "sliding_window": 5, "layer_types": families._MIXED},
    ),
    "neighbours put apart, behind": ("DeepseekV3Config", LATENT),
    "scaled, behind": ("DeepseekV3Config", {**LATENT, "rope_parameters": YARN}),
    "a part": ("PhiConfig", {}),
    "a norm without weights": ("NanoChatConfig", {}),
}


def built(config: str, own: dict[str, Any], **options: Any) -> Any:
    """A tiny model of a config's family."""
    families.CONFIGS["built"] = families._with(getattr(transformers, config), **own)
    try:
        return build("built", **options)
    finally:
        del families.CONFIGS["built"]


def assert_right(base: Any) -> None:
    """A window over everything is the base, in segments and in pieces, padded and not."""
    text = ids(2, 21)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.wrap(base, tiny("window", window_size=32, num_sinks=2))
        assert_close(model(text).logits, want, 1e-5)
    assert_pieces_and_padding(model)
    memwrap.unwrap(model)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_in_half_types_are_no_fault(dtype: torch.dtype, attention: str) -> None:
    """What a half type rounds of scores of some tens is more than its resolution: it is measured,
    and not taken for a rotation that cannot be taken back."""
    base = build("llama", attention=attention)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.k_proj.weight.mul_(6)
    for memory in ("window", "landmark"):
        model = memwrap.wrap(base.to(dtype), tiny(memory))
        assert model(ids(1, 20)).logits.isfinite().all()
        memwrap.unwrap(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_over_everything_is_the_base(kind: str) -> None:
    assert_right(built(*KINDS[kind]))


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2"])
def test_inputs_that_are_projected_again_are_not_rotated(family: str) -> None:
    assert_pieces_and_padding(wrapped("compressive", family, store="hidden"))


def test_a_landmark_knows_sinks() -> None:
    """One block is plain attention, with the score more that the model's softmax has."""
    base, text = build("gpt_oss"), ids(2, 8)
    with torch.no_grad():
        want = base(text).logits
        assert_close(memwrap.wrap(base, tiny("landmark", block_size=8))(text).logits, want, 1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_any_pairs_are_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are paired, signed and given their angle as no family does it."""
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[: 6 if seed else 8]
    first, second = shuffled.chunk(2)
    place = torch.randperm(4, generator=torch.Generator().manual_seed(seed))[: len(first)]
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[: len(first)]

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos[:, None, :, place], sin[:, None, :, place + 4] * sign
        y = x.clone()
        y[..., first] = cos * x[..., first] - sin * x[..., second]
        y[..., second] = cos * x[..., second] + sin * x[..., first]
        return y

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return turn(q, cos, sin), turn(k, cos, sin)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply)
    assert_right(build("llama"))


def _changed(base: Any, forward: Callable[..., Any]) -> Any:
    """Change the attention of every layer."""
    kind = modeling_llama.LlamaAttention
    for layer in base.model.layers:
        layer.self_attn.__class__ = type("Changed", (kind,), {"forward": forward})
    return base


def _moved(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    scale = 1 + 0.1 * kwargs["position_ids"][..., None]
    return modeling_llama.LlamaAttention.forward(self, hidden_states * scale, *args, **kwargs)


def _mixed(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    mixed = hidden_states + hidden_states.roll(1, 1)
    return modeling_llama.LlamaAttention.forward(self, mixed, *args, **kwargs)


def _biased(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    if (mask := kwargs.get("attention_mask")) is not None:
        kwargs["attention_mask"] = mask - 0.1 * torch.arange(mask.shape[-1]).flip(0)
    return modeling_llama.LlamaAttention.forward(self, hidden_states, *args, **kwargs)


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        pytest.param(
            lambda: built("HunYuanDenseV1Config", {"head_dim": 8}), "take back", id="norm"
        ),
        # In transformers 5.17 its attention cannot be met at all.
        pytest.param(
            lambda: built("GPTJConfig", {"rotary_dim": 4}),
            "take back|attention functions",
            id="table",
        ),
        pytest.param(lambda: built("DiffLlamaConfig", {}), "attends several times", id="twice"),
        pytest.param(lambda: _changed(build("llama"), _moved), "take back", id="by position"),
        pytest.param(lambda: _changed(build("llama"), _mixed), "see those behind", id="mixed"),
        pytest.param(
            lambda: _changed(build("llama", attention="eager"), _biased), "distance", id="biases"
        ),
    ],
)
def test_what_is_not_known_is_refused(base: Callable[[], Any], reason: str) -> None:
    """At wrap, and the model is as it was."""
    model, text = base(), ids(1, 9)
    with torch.no_grad():
        want = model(text).logits
        with pytest.raises(ValueError, match=reason):
            memwrap.wrap(model, "window")
        assert torch.equal(model(text).logits, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    """They are looked at as closely as they allow; a norm's weights are seen in them too."""
    for family in ("llama", "gpt_oss", "deepseek_v2"):
        assert Backbone(build(family).to(dtype)).attention_sizes()
    uneven = built("HunYuanDenseV1Config", {"head_dim": 8}).to(dtype)
    with pytest.raises(ValueError, match="take back"):
        Backbone(uneven).attention_sizes()


def test_a_softmax_that_is_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window goes through the model's own function; landmark, which does not, is refused."""

    def off_by_one(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        if mask is not None:
            scores = scores + mask
        weights = torch.nn.functional.pad(scores, (0, 1)).softmax(-1)[..., :-1]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", off_by_one)
    monkeypatch.setattr(memwrap.backbones.attention, "_eager_of", lambda kind: off_by_one)
    assert_right(build("llama", attention="eager"))
    with pytest.raises(ValueError, match="computes the softmax itself"):
        memwrap.wrap(build("llama", attention="eager"), tiny("landmark"))


def test_layers_of_one_kind_share_their_angles() -> None:
    """What was learned of one layer is taken for the others that it fits."""
    for family, number in (("llama", 1), ("gemma3", 2), ("smollm3", 1)):
        parts = Backbone(build(family))
        parts.attention_sizes()
        assert len({parts.rotary.kind(layer) for layer in range(2)} - {None}) == number, family


@pytest.mark.parametrize("memory", ["infini", "ahn"])
def test_a_segment_closes_without_tokens(memory: str) -> None:
    """A model that caches latents closes an open segment as one that a token fills."""
    trees = []
    for length in (8, 5):
        model, text = wrapped(memory, "deepseek_v2", segment_size=length), ids(2, 5)
        state = model.read(text)
        trees.append((model.close_segment(state) if length == 8 else state).memories[memory])
    for (name, got), (_, want) in zip(*map(tree_leaves, trees), strict=True):
        assert_close(got.float(), want.float(), 1e-6, name)
