"""Conformance of Liger: one attention layer, and a whole model with decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, names_of, read_case
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.ops import gla
from memwrap.ops.gla import gsa
from memwrap.ops.gla.features import features

NAMES = names_of("liger")
SHARED = ("recurrence", "B", "T", "H", "Hkv", "d", "window", "swa_weight", "grm_weight",
          "gate_norm", "rope_theta", "seed")  # fmt: skip
LAYER = ("D", "keys_visible", "bias", "pool_size", "scale_recurrence")
MODEL = ("P", "vocab", "hidden", "layers", "intermediate", "rms_eps")


def config_of(case: Case, segment_size: int) -> memwrap.LigerConfig:
    own = case.settings
    return memwrap.LigerConfig(
        segment_size=segment_size,
        form=own["recurrence"],
        window_size=own["window"] + 1,  # the published window sees one key more
        num_sinks=0,
        window_weight=own["swa_weight"],
        recurrent_weight=own["grm_weight"],
        gate_divisor=own["gate_norm"],
        num_slots=own.get("pool_size"),
    )


def llama(case: Case, **sizes: Any) -> LlamaForCausalLM:
    own = case.settings
    config = LlamaConfig(
        num_attention_heads=own["H"], num_key_value_heads=own["Hkv"], head_dim=own["d"],
        rope_parameters={"rope_type": "default", "rope_theta": own["rope_theta"]},
        tie_word_embeddings=False, max_position_embeddings=512, **sizes,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config).eval()


def one_layer(case: Case) -> Any:
    """A model whose logits are its input embeddings plus the attention's output."""
    width = case.settings["D"]
    base = llama(
        case, vocab_size=width, hidden_size=width, num_hidden_layers=1, intermediate_size=8
    )
    layer = base.model.layers[0]
    layer.input_layernorm = base.model.norm = nn.Identity()
    with torch.no_grad():
        nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.eye_(base.lm_head.weight)
        for name in "qkvo":
            getattr(layer.self_attn, f"{name}_proj").weight.copy_(case.tensors[f"W_{name}"])
    return memwrap.wrap(base, config_of(case, 2 * case.settings["T"]))


def near(got: Tensor, want: Tensor, most: float, what: str) -> None:
    assert got.shape == want.shape, what
    error = float((got.detach() - want).abs().max() / want.abs().max())
    assert error < most, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str) -> None:
    if "attention" in name:
        check_attention(name)
    else:
        for segment_size in (16, 128):  # whatever it is: the window reaches over segment ends
            check_model(name, segment_size)


def check_attention(name: str) -> None:
    outputs = {"output", "o_recurrent", "y_swa", "recurrent_state", "recurrent_state_k",
               "recurrent_state_v", "q_feat", "k_feat", "v_rep", "g_log", "slot",
               "roped_k"}  # fmt: skip
    case = read_case("liger", name, outputs)
    weights = ("W_q", "W_k", "W_v", "W_o")
    case.known(*SHARED, *LAYER)
    case.given("hidden_states", "position_ids", "attention_mask", "do", *weights)
    own, t = case.settings, case.tensors
    assert own["keys_visible"] == own["window"] + 1 and own["scale_recurrence"] == 1
    assert not own["bias"] and own["T"] == t["hidden_states"].shape[1]
    mask = t.get("attention_mask", torch.ones(own["B"], own["T"]))
    real = mask.bool()[..., None]
    model, x = one_layer(case), t["hidden_states"].clone().requires_grad_()
    memory = model.memories["liger"]

    def run(branch: str) -> Tensor:
        with memory.only(branch):
            return (model(inputs_embeds=x, attention_mask=mask.long()).logits - x) * real

    def projected(heads: Tensor) -> Tensor:
        return (heads.transpose(1, 2).flatten(2) @ t["W_o"].T) * real

    near(run("window"), projected(t["y_swa"]), 1e-5, "y_swa")
    near(run("recurrent"), projected(t["o_recurrent"]), 1e-5, "o_recurrent")
    output = run("both")
    near(output, t["output"] * real, 1e-5, "output")
    (output * t["do"]).sum().backward()
    layer = model.backbone.model.layers[0].self_attn
    near(x.grad * real, t["grad.hidden_states"] * real, 1e-5, "grad.hidden_states")
    for letter in "qkvo":
        grad = getattr(layer, f"{letter}_proj").weight.grad
        near(grad, t[f"grad.W_{letter}"], 1e-5, f"grad.W_{letter}")
    with torch.no_grad():
        state = model(inputs_embeds=x, attention_mask=mask.long()).cache
    tree, group = state.memories["liger"]["layers"]["0"], own["H"] // own["Hkv"]
    states = {"S": "recurrent_state", "K": "recurrent_state_k", "V": "recurrent_state_v"}
    for short, long in states.items():
        assert (short in tree) == (long in t)
        if short in tree:
            near(tree[short].repeat_interleave(group, 1), t[long], 1e-5, long)
    check_parts(case, mask.bool())


def check_parts(case: Case, real: Tensor) -> None:
    """The reference's own intermediate tensors, through the ops."""
    own, t = case.settings, case.tensors
    q, k, v = (
        (t["hidden_states"] @ t[f"W_{n}"].T).unflatten(-1, (-1, own["d"])).transpose(1, 2)
        for n in "qkv"
    )
    group, here = own["H"] // own["Hkv"], real[:, None, :, None]
    k, v = (n.repeat_interleave(group, 1) for n in (k, v))
    near(v * here, t["v_rep"] * here, 1e-5, "v_rep")
    kind = "none" if own["recurrence"] == "gsa" else "softmax"
    near(features(q, kind), t["q_feat"], 1e-5, "q_feat")
    if own["recurrence"] == "hgrn2":
        near(1 - k.sigmoid(), t["k_feat"], 1e-5, "k_feat")
    else:
        near(features(k, kind), t["k_feat"], 1e-5, "k_feat")
    pooled = k if own["pool_size"] is None else k.unflatten(-1, (own["pool_size"], -1)).mean(-1)
    near(F.logsigmoid(pooled) / (own["gate_norm"] or 1), t["g_log"], 1e-5, "g_log")
    angles = t["position_ids"][:, None, :, None] * own["rope_theta"] ** (
        -torch.arange(0, own["d"], 2) / own["d"]
    )
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    first, second = k.chunk(2, -1)
    near((k * cos + torch.cat([-second, first], -1) * sin), t["roped_k"], 1e-5, "roped_k")
    full: Any = {"scale": 1.0, "mask": real}
    if "slot" in t:
        near(1 - t["g_log"].exp(), t["slot"], 1e-5, "slot")
        out, _ = gsa.scan(t["q_feat"], t["k_feat"], t["v_rep"], t["slot"], t["g_log"], **full)
    else:
        out, _ = gla.scan(t["q_feat"], t["k_feat"], t["v_rep"], t["g_log"], **full)
    near(out * here, t["o_recurrent"] * here, 1e-5, "o_recurrent by the op")


def check_model(name: str, segment_size: int) -> None:
    outputs = ("logits", "loss", "prefill_recurrent_state", "decode_logits")
    case = read_case("liger", name, outputs)
    case.known(*SHARED, *MODEL)
    case.given("input_ids", "prefill_length")
    own, t = case.settings, case.tensors
    base = llama(
        case, vocab_size=own["vocab"], hidden_size=own["hidden"],
        num_hidden_layers=own["layers"], intermediate_size=own["intermediate"],
        rms_norm_eps=own["rms_eps"],
    )  # fmt: skip
    base.load_state_dict({n[5:]: x for n, x in t.items() if n.startswith("base.")}, strict=True)
    model = memwrap.linearize(base, config_of(case, segment_size))
    assert not list(model.memory_parameters())
    ids, prefill = t["input_ids"], own["P"]
    assert prefill == int(t["prefill_length"])
    with torch.no_grad():
        near(model(ids).logits, t["logits"], 1e-4, "logits")
        near(model(ids, labels=ids).loss, t["loss"], 1e-5, "loss")
        state = model.read(ids[:, :prefill])
        layers = state.memories["liger"]["layers"]
        group = own["H"] // own["Hkv"]
        got = torch.stack([layers[str(i)]["S"] for i in range(own["layers"])])
        want = t["prefill_recurrent_state"]
        near(got.repeat_interleave(group, 2), want, 1e-4, "prefill_recurrent_state")
        steps = [model(ids[:, i : i + 1], cache=state) for i in range(prefill, own["T"])]
        near(torch.cat([s.logits for s in steps], 1), t["decode_logits"], 1e-4, "decode_logits")
