"""Conformance of Liger: one attention layer, and a whole model with decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbones import backbone_of, in_precision, llama, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, names_of, read_case
from one_layer import rotated_by_hand
from torch import Tensor, nn

import memwrap
from memwrap.ops import gla
from memwrap.ops.gla import gsa
from memwrap.ops.gla.features import features

OP = Tolerances(reference={"": 1e-5}, float32={"": 1e-5})
MODEL = Tolerances(reference={"": 2e-5, "loss": 1e-6}, float32={"": 2e-5, "loss": 1e-6})
STATES = {"S": "recurrent_state", "K": "recurrent_state_k", "V": "recurrent_state_v"}


def config_of(case: Case, segment_size: int) -> memwrap.LigerConfig:
    own = case.settings
    case.holds(keys_visible=own["window"] + 1, scale_recurrence=1)
    case.aside("seed")
    return memwrap.LigerConfig(
        segment_size=segment_size,
        form=own["recurrence"],
        window_size=own["window"] + 1,  # the published window sees one key more
        num_sinks=0,
        window_weight=own["swa_weight"],
        recurrent_weight=own["grm_weight"],
        gate_divisor=own["gate_norm"] or 1.0,
        num_slots=own.get("pool_size"),
    )


def one_layer(case: Case) -> Any:
    """A model whose logits are its input embeddings plus the attention's output."""
    width = case.settings["D"]
    own = {"vocab_size": width, "hidden_size": width, "num_hidden_layers": 1,
           "intermediate_size": 8, "attention_bias": case.settings["bias"]}  # fmt: skip
    base = llama(sizes_of(case.settings) | own).eval()
    layer = base.model.layers[0]
    layer.input_layernorm = base.model.norm = nn.Identity()
    base = in_precision(base, case.dtype)
    with torch.no_grad():
        nn.init.zeros_(layer.mlp.down_proj.weight)
        nn.init.eye_(base.lm_head.weight)
        for name, parameter in projections(base).items():
            value = case.given(name)
            parameter.copy_(torch.zeros_like(parameter) if value is None else value)
    return memwrap.wrap(base, config_of(case, 2 * case.settings["T"]))


def projections(base: Any) -> dict[str, Tensor]:
    """The attention's parameters by the cases' names."""
    attention = base.model.layers[0].self_attn
    found = {}
    for letter in "qkvo":
        projection = getattr(attention, f"{letter}_proj")
        found[f"W_{letter}"] = projection.weight
        if projection.bias is not None:
            found[f"b_{letter}"] = projection.bias
    return found


def run_attention(case: Case) -> Got:
    own, t = case.settings, case.tensors
    mask = case.given("attention_mask")
    x = t["hidden_states"].clone().requires_grad_()
    case.holds(B=len(x), T=x.shape[1], D=x.shape[2], bias="b_q" in t)
    mask = torch.ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
    real, weight = mask.bool()[..., None], t["W_o"]
    model, group = one_layer(case), own["H"] // own["Hkv"]
    memory = model.memories["liger"]

    def run(branch: str) -> Tensor:
        with memory.only(branch):
            return (model(inputs_embeds=x, attention_mask=mask).logits - x) * real

    for name in ("y_swa", "o_recurrent"):  # as what is added to the input
        heads = case.want(name).transpose(1, 2).flatten(2)
        t[name] = (heads @ weight.T) * real
    # What stands at padding has no meaning.
    t["output"], t["grad.hidden_states"] = (
        case.want(n) * real for n in ("output", "grad.hidden_states")
    )
    got = {"y_swa": run("window"), "o_recurrent": run("recurrent"), "output": run("both")}
    (got["output"] * t["do"]).sum().backward()
    got["grad.hidden_states"] = x.grad * real  # type: ignore[operator]
    got |= {f"grad.{n}": p.grad for n, p in projections(model.backbone).items()}  # type: ignore[misc]
    with torch.no_grad():
        state = model(inputs_embeds=x, attention_mask=mask).cache
    tree = state.memories["liger"]["layers"]["0"]
    for short, long in STATES.items():
        assert (short in tree) == (long in t), f"{case.name}: {sorted(tree)} are kept"
        if short in tree:
            got[long] = tree[short].repeat_interleave(group, 1)
    parts = run_parts(case, mask.bool())
    return {**got, **parts, "o_recurrent": [got["o_recurrent"], parts["o_recurrent"]]}


def run_parts(case: Case, real: Tensor) -> dict[str, Tensor]:
    """The reference's own intermediate tensors, through the ops."""
    own, t = case.settings, case.tensors
    heads = {}
    for n in "qkv":
        x, bias = t["hidden_states"] @ t[f"W_{n}"].T, case.given(f"b_{n}")
        x = x if bias is None else x + bias
        heads[n] = x.unflatten(-1, (-1, own["d"])).transpose(1, 2)
    group, here = own["H"] // own["Hkv"], real[:, None, :, None]
    q, k, v = heads["q"], *(heads[n].repeat_interleave(group, 1) for n in "kv")
    t["v_rep"] = case.want("v_rep") * here
    kind = "none" if own["recurrence"] == "gsa" else "softmax"
    q_feat = features(q, kind)
    k_feat = 1 - k.sigmoid() if own["recurrence"] == "hgrn2" else features(k, kind)
    pooled = k if own["pool_size"] is None else k.unflatten(-1, (own["pool_size"], -1)).mean(-1)
    g_log = F.logsigmoid(pooled) / (own["gate_norm"] or 1)
    got = {"v_rep": v * here, "q_feat": q_feat, "k_feat": k_feat, "g_log": g_log}
    places = t["position_ids"][:, None]
    got["roped_k"] = rotated_by_hand(k, own["rope_theta"], places)
    full: Any = {"scale": 1.0, "mask": real}
    if "slot" in t:
        got["slot"] = 1 - g_log.exp()
        out, _ = gsa.scan(q_feat, k_feat, v, got["slot"], g_log, **full)
    else:
        out, _ = gla.scan(q_feat, k_feat, v, g_log, **full)
    got["o_recurrent"] = (out.transpose(1, 2).flatten(2) @ t["W_o"].T) * real[..., None]
    return got


def run_model(case: Case, segment_size: int) -> Got:
    own, ids, prefill = case.settings, case.tensors["input_ids"], case.settings["P"]
    sizes = sizes_of(own)
    model = memwrap.linearize(backbone_of(case, sizes), config_of(case, segment_size))
    assert not list(model.memory_parameters())
    case.holds(B=len(ids), T=ids.shape[1], P=int(case.tensors["prefill_length"]))
    group = own["H"] // own["Hkv"]
    with torch.no_grad():
        got = {"logits": model(ids).logits, "loss": model(ids, labels=ids).loss}
        state = model.read(ids[:, :prefill])
        layers = state.memories["liger"]["layers"]
        for short in layers["0"].keys() & STATES.keys():
            kept = torch.stack([layers[str(i)][short] for i in range(sizes["num_hidden_layers"])])
            got[f"prefill_{STATES[short]}"] = kept.repeat_interleave(group, 2)
        steps = [model(token, cache=state).logits for token in ids[:, prefill:].split(1, 1)]
    return {**got, "decode_logits": torch.cat(steps, 1)}


def check(case: Case, segment_size: int = 16) -> None:
    if case.level == "op":
        compare(case, run_attention(case), OP)
    elif case.level == "model":
        compare(case, run_model(case, segment_size), MODEL)
    else:
        case.not_understood()


@both_precisions
@pytest.mark.parametrize("name", names_of("liger"))
def test_case(name: str, dtype: torch.dtype) -> None:
    for segment_size in (16, 128):  # whatever it is: the window reaches over segment ends
        check(read_case("liger", name, dtype), segment_size)
