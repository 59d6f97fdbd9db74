"""Backbones that have recurrent layers of their own, in the order in which they come: what such
layers remember travels from segment to segment."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import refused
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import memwrap
from memwrap.backbones.feedforward import inputs_noted_in
from memwrap.backbones.recurrence import SUPPORTED
from memwrap.evaluation.perplexity import perplexity_by_position
from memwrap.testing.helpers import assert_close, error_of, tiny

SEGMENT, LENGTH = 8, 30
_COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
_EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8}
_THIRD = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
_SHORT = ["conv", "conv", "full_attention", "conv"]

# Delta rules (gated, by channel), state spaces, short convolutions; layers that do both, and
# layers that do neither.
# transformers' own layers loop over tokens there, half a minute long.
SLOW = {"kimi_linear": pytest.param("kimi_linear", marks=pytest.mark.slow)}
ALL: dict[str, dict[str, Any]] = {
    "qwen3_next": _DELTA | _EXPERTS | {"layer_types": _THIRD},
    "qwen3_5_text": _DELTA | {"layer_types": _THIRD},
    "qwen3_5_moe_text": _DELTA | _EXPERTS | {"layer_types": _THIRD},
    "olmo_hybrid": _DELTA | {"layer_types": _THIRD},
    "kimi_linear": {
        "num_key_value_heads": 4, "head_dim": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "kv_lora_rank": 16, "linear_num_attention_heads": 4,
        "layer_types": _THIRD, "num_experts": 4, "num_experts_per_token": 2,
        "moe_intermediate_size": 16,
    },
    "bailing_hybrid": _DELTA | {
        "num_key_value_heads": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6,
        "q_lora_rank": 16, "kv_lora_rank": 16, "layer_types": _THIRD, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "lfm2": {"layer_types": _SHORT, "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": _EXPERTS | {"layer_types": _SHORT, "conv_L_cache": 3},
    "granitemoehybrid": _MAMBA | {"num_local_experts": 4, "layer_types": _THIRD},
    "bamba": _MAMBA | {"attn_layer_indices": [2]},
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "layer_types": ["linear_attention", "mlp", "full_attention", "mlp"],
    },
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
}  # fmt: skip
carried = pytest.mark.skipif(not SUPPORTED, reason="refused before transformers 5.21")


def small(kind: str, **own: Any) -> Any:
    """A random model, weights four times as large as drawn, so that logits are not flat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_COMMON, **ALL.get(kind, {}), **own})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(4)
    return model


def text(rows: int = 2) -> Tensor:
    return torch.randint(3, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def wide(base: Any) -> memwrap.MemoryModelForCausalLM:
    """A window that sees all of the text: the base, read in segments."""
    return memwrap.wrap(
        base, memwrap.WindowConfig(segment_size=SEGMENT, window_size=64, num_sinks=0)
    )


@carried
@pytest.mark.parametrize("kind", [SLOW.get(kind, kind) for kind in ALL])
@torch.no_grad()
def test_segments_give_what_the_base_gives_at_once(kind: str) -> None:
    base, ids = small(kind), text()
    want = base(ids).logits
    model = wide(base)
    assert_close(model(ids).logits, want, 1e-5)
    state, parts = None, []
    for piece in ids.split([5, 1, 1, 12, 11], dim=1):
        out = model(piece, cache=state, use_cache=True)
        state = out.cache
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), want, 1e-5)
    # The base itself goes astray at padding inside what it has read; rows alone do not.
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, -4:] = 0, 0
    logits = model(ids, attention_mask=mask).logits
    assert_close(logits[0, 5:], base_alone(kind, ids[:1, 5:])[0], 1e-5)
    assert_close(logits[1, :-4], base_alone(kind, ids[1:, :-4])[0], 1e-5)


def base_alone(kind: str, ids: Tensor) -> Tensor:
    return small(kind)(ids).logits


@carried
@pytest.mark.parametrize("kind", ["nemotron_h", "qwen3_5_text"])
def test_a_step_of_one_token_writes_into_no_state(kind: str) -> None:
    """Their own step of one token writes what they remember in place: a state is asked twice, and
    a last segment of one token trains as the base does."""
    base, ids = small(kind), text()
    want = base(ids).logits
    model = wide(base)
    with torch.no_grad():
        state = model.read(ids[:, : SEGMENT + 3])
    token = ids[:, SEGMENT + 3 : SEGMENT + 4]
    for _ in range(2):
        assert_close(model(token, cache=state.clone()).logits[:, 0], want[:, SEGMENT + 3], 1e-5)
    short = ids[:, : 2 * SEGMENT + 1]
    model(short, labels=short).loss.backward()
    got = {name: p.grad for name, p in base.named_parameters() if p.grad is not None}
    other = small(kind)
    other(short, labels=short).loss.backward()
    names = [name for name, p in other.named_parameters() if p.grad is not None]
    assert names and names == list(got)
    for name, parameter in other.named_parameters():
        if name in got:
            assert_close(got[name], parameter.grad, 1e-3)


@carried
@torch.no_grad()
def test_bf16_in_pieces_is_as_near_to_float32_as_at_once() -> None:
    """What pieces differ by is rounding, as in the base (measured: 1.0 times as far off)."""
    base, ids = small("qwen3_5_text"), text()
    exact = memwrap.wrap(small("qwen3_5_text"), tiny("armt"))
    model = memwrap.wrap(base.to(torch.bfloat16), tiny("armt"))
    model.memory_modules.load_state_dict(exact.memory_modules.state_dict())
    want, state, parts = exact(ids).logits, model.new_state(2), []
    for piece in ids.split([5, 1, 1, 12, 11], dim=1):
        parts.append(model(piece, cache=state).logits)
    both = torch.cat(parts, 1), model(ids).logits
    errors = [float((got - want).norm() / want.norm()) for got in both]
    assert 1e-3 < errors[0] < 1.3 * errors[1], errors


@carried
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "bamba"])
@torch.no_grad()
def test_rows_at_different_places_do_not_meet(kind: str) -> None:
    """Rows that have read 3, 11 and 0 tokens are read on together: as each alone."""
    ids, model = text(3), wide(small(kind))
    lengths = (3, 11, 0)
    mask = torch.stack([torch.arange(11) >= 11 - n for n in lengths]).long()
    state = model.new_state(3)
    left = [torch.nn.functional.pad(r[:n], (11 - n, 0)) for r, n in zip(ids, lengths, strict=True)]
    model(torch.stack(left), attention_mask=mask, cache=state)
    together = model(ids[:, 11:17], cache=state).logits
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row, :length], ids[row, 11:17]])[None]
        assert_close(together[row], model(alone).logits[0, length:], 1e-5)


@carried
@torch.no_grad()
def test_memory_off_keeps_what_the_base_remembers() -> None:
    """Without its memory the model still is the base it was: other tokens are felt behind
    their segment in a recurrent base, and nowhere in one without."""
    ids = text(1)
    other = torch.cat([ids[:, :4], ids[:, 4:SEGMENT] % 60 + 3, ids[:, SEGMENT:]], 1)
    for kind, felt in (("qwen3_5_text", True), ("llama", False)):
        model = memwrap.wrap(small(kind), memwrap.ARMTConfig(segment_size=SEGMENT))
        first, second = (model(x, memory_control="off").logits for x in (ids, other))
        assert (error_of(second[:, SEGMENT:], first[:, SEGMENT:]) > 1e-3) == felt
        # However much is asked for beside it.
        kept = model(ids, memory_control="off", use_cache=True).logits
        assert_close(kept, model(ids, memory_control="off", use_cache=False).logits, 1e-6)


@carried
@torch.no_grad()
def test_memory_off_with_nothing_ever_written_changes_nothing() -> None:
    base, ids = small("qwen3_5_text"), text()
    model = memwrap.wrap(base, memwrap.InfiniConfig(segment_size=64))
    assert_close(model(ids, memory_control="off").logits, model(ids).logits, 1e-6)


@carried
def test_an_evaluation_is_the_same_however_much_is_fed_at_once() -> None:
    model = memwrap.wrap(small("qwen3_5_text"), memwrap.ARMTConfig(segment_size=SEGMENT))
    one, many = (
        perplexity_by_position(
            model, list(text()), window=SEGMENT, piece_tokens=piece, progress=False
        ).curves
        for piece in (SEGMENT, 64)
    )
    assert len(one) == 6
    for name, curve in one.items():
        assert curve.overall == pytest.approx(many[name].overall, rel=1e-5)
    assert one["memory off"].overall != pytest.approx(one["base, truncated"].overall, rel=1e-5)


@carried
@pytest.mark.parametrize("kind", ["qwen3_5_text", "nemotron_h", "falcon_h1"])
@torch.no_grad()
def test_the_feed_forward_block_of_a_last_layer_that_does_not_only_attend(kind: str) -> None:
    base = small(kind)
    memwrap.wrap(base, "knnlm")
    given: list[Tensor] = []
    with inputs_noted_in(given):
        base(text())
    blocks = {n: m for n, m in base.get_decoder().layers[-1].named_modules()}
    name = {"nemotron_h": "mixer", "falcon_h1": "feed_forward"}.get(kind, "mlp")
    seen: list[Tensor] = []
    handle = blocks[name].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    base(text())
    handle.remove()
    assert_close(given[0], seen[0], 1e-6)


@carried
def test_the_state_holds_it_and_counts_it() -> None:
    model = wide(small("qwen3_5_text"))
    state = model.read(text())
    trees = state.memories["backbone"]
    assert sorted(trees) == ["0", "1", "3"]
    assert trees["0"]["recurrent"]["0"].shape == (2, 4, 8, 8)
    # Two rows; three layers; a float32 matrix of 8 x 8 for each of four heads, and the last four
    # tokens of the 64 channels that are convolved.
    assert state.nbytes - without(state).nbytes == 2 * 3 * 4 * (4 * 8 * 8 + 4 * 64)


def without(state: memwrap.MemoryState) -> memwrap.MemoryState:
    other = state.clone()
    other.memories = {n: t for n, t in state.memories.items() if n != "backbone"}
    return other


@carried
def test_gradients_flow_through_what_the_base_remembers() -> None:
    """In segments as at once; cut where the memory's gradients are cut."""
    ids, grads = text(), {}
    for name, size, kept in (("base", 64, None), ("segments", SEGMENT, None), ("cut", SEGMENT, 1)):
        base = small("qwen3_5_text")
        config = memwrap.WindowConfig(
            segment_size=size, window_size=64, num_sinks=0, bptt_segments=kept
        )
        model = memwrap.wrap(base, config).train()
        embeds = base.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds).logits[:, SEGMENT:].square().mean().backward()
        grads[name] = embeds.grad
    assert_close(grads["segments"], grads["base"], 1e-4)
    assert grads["base"][:, :SEGMENT].abs().max() > 0
    assert grads["cut"][:, :SEGMENT].abs().max() == 0


@carried
@pytest.mark.parametrize(
    ("kind", "own", "said"),
    [
        (  # continues its convolution, but not its state
            "jamba",
            {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2},
            ("does not go on", "several tokens"),
        ),
        ("minimax", {"num_local_experts": 4}, ("MiniMax", "cannot carry")),
    ],
)
def test_what_cannot_be_carried_is_refused(
    kind: str, own: dict[str, Any], said: tuple[str, ...]
) -> None:
    base = small(kind, **own)
    classes = [type(m) for m in base.modules()]
    with refused(*said):
        memwrap.wrap(base, memwrap.RMTConfig(segment_size=SEGMENT))
    assert [type(m) for m in base.modules()] == classes


@carried
def test_layers_without_attention_are_not_chosen_for_it() -> None:
    base = small("qwen3_5_text")
    with refused("InfiniConfig.layers", r"\[0\]", r"\[2\]"):
        memwrap.wrap(base, memwrap.InfiniConfig(layers=[0, 2]))
    assert list(memwrap.wrap(base, "liger").memories["liger"].chosen) == [2]
    memwrap.unwrap(memwrap.wrap(small("lfm2"), "memorizing"))
    with refused("NeurocacheConfig.attention_layers", r"\[3\]"):
        memwrap.wrap(small("lfm2"), memwrap.NeurocacheConfig(attention_layers=[2, 3]))


@carried
@torch.no_grad()
def test_eager_attention_gives_the_same() -> None:
    ids, base = text(), small("qwen3_5_text")
    want = base(ids).logits
    base.set_attn_implementation("eager")
    assert_close(wide(base)(ids).logits, want, 1e-5)


@carried
def test_layers_that_lost_their_states_are_noticed() -> None:
    base = small("qwen3_5_text")
    model = wide(base)
    module = base.get_decoder().layers[1].linear_attn
    module.__class__ = type(module)._memwrap_parent
    with refused("2 of Qwen3_5", "3 recurrent layers"):
        model.read(text())


def test_an_older_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memwrap.backbones.recurrence.SUPPORTED", False)
    for kind in ALL.keys() & CONFIG_MAPPING.keys():  # an older one lacks some
        with refused("recurrent layers", "transformers 5.21"):
            memwrap.wrap(small(kind), "rmt")
