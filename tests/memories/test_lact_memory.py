"""LaCT against its formulas written as loops, and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from one_layer import bare_attention
from support import assert_pieces_and_padding, crossed
from torch import Tensor

import memwrap
from memwrap.ops import fast_weights
from memwrap.state.trees import tree_leaves
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, gradients, ids, wrapped

VARIANTS: list[dict[str, Any]] = [
    {"step": "muon"},
    {"step": "gradient", "momentum": False, "inner_width": 5},
    {"step": "muon", "row_norm": "pre", "layers": [1]},
    {"step": "gradient", "network": "mlp", "num_sinks": 0, "window_size": None},
    {"step": "muon", "first_segment": "read"},
    {"step": "titans", "network": "linear"},
    {"step": "titans", "network": "swiglu", "momentum": False},
]


def settings_id(variant: dict[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


def unit(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    x = F.silu(x * scale + offset)
    return x / (x.norm() + 1e-5)


def swiglu(weights: Any, x: Tensor) -> Tensor:
    return weights[1] @ (F.silu(weights[0] @ x) * (weights[2] @ x))


@pytest.mark.parametrize("start_with", ["local_only", "read"])
@pytest.mark.parametrize("step", ["gradient", "muon"])
def test_a_layer_is_its_formula(step: str, start_with: str) -> None:
    """Token by token: what the network found by the closed segments makes of a query is normed,
    scaled and added to the softmax over the window; gradients of the write are autograd's."""
    size, count = 4, 14
    base, attention = bare_attention()
    model = memwrap.wrap(
        base, "lact", segment_size=size, num_sinks=0, step=step, first_segment=start_with
    )
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    layer: Any = model.memories["lact"].networks["0"]
    x = torch.randn(1, count, 32)
    with torch.no_grad():
        got = (model(inputs_embeds=x).logits - x)[0].unflatten(-1, (4, 8))
        with model.memories["lact"].only("window"):
            near = (model(inputs_embeds=x).logits - x)[0].unflatten(-1, (4, 8))
    q, k, v = (
        p(x[0]).detach().unflatten(-1, (-1, 8)).transpose(0, 1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    far = torch.zeros(count, 4, 8)
    for g in range(2):
        first = [w[g].detach() for w in layer.first]
        weights, before = first, [torch.zeros_like(w) for w in first]
        for start in range(0, count, size):
            tokens = range(start, min(start + size, count))
            for t in tokens:
                for h in (2 * g, 2 * g + 1):
                    query = unit(q[h, t], layer.query_scale[h], layer.query_offset[h])
                    read = swiglu(weights, query)
                    read = read * torch.rsqrt(read.square().mean() + 1e-5) * layer.norm
                    if start or start_with == "read":
                        far[t, h] = read * F.silu(layer.read[h] @ x[0, t])
            if len(tokens) < size:
                break
            share = torch.stack([
                torch.sigmoid(layer.keep[g] @ x[0, t] + layer.keep_bias[g]) for t in tokens
            ]).mean()  # fmt: skip
            sums = [share.detach() * d for d in before]
            for t in tokens:
                leaves = [w.clone().requires_grad_() for w in weights]
                key = unit(k[g, t], layer.key_scale[g], layer.key_offset[g]).detach()
                loss = -(F.silu(v[g, t]) @ swiglu(leaves, key))
                taken = torch.autograd.grad(loss, leaves)
                rates = F.softplus(layer.rate[g] @ x[0, t] + layer.rate_bias[g]).detach()
                sums = [d - r * dw for d, r, dw in zip(sums, rates, taken, strict=True)]
            before = sums
            moves = [fast_weights.orthogonalized(d) for d in sums] if step == "muon" else sums
            moved = [w + move for w, move in zip(weights, moves, strict=True)]
            weights = [
                w / (w.norm(dim=1, keepdim=True) + 1e-5) * f.norm(dim=1, keepdim=True)
                for w, f in zip(moved, first, strict=True)
            ]
    assert error_of(near, near + far) > 0.1
    assert_close(got, near + far, 1e-4)


@pytest.mark.parametrize(("variant", "family"), crossed(VARIANTS, ["llama", "gemma3", "opt"], 1))
def test_pieces_and_padding(family: str, variant: dict[str, Any]) -> None:
    # Muon makes all directions of a step equally long, those of rounding too (1.2e-4 in float32).
    muon = variant["step"] == "muon"
    base = build(family).double() if muon else build(family)
    assert_pieces_and_padding(wrapped("lact", base=base, **variant), (27, 18))


def test_before_training_it_is_the_window() -> None:
    text = ids(2, 40)
    settings = {"segment_size": 8, "num_sinks": 2}
    with torch.no_grad():
        got = memwrap.wrap(build("qwen3"), "lact", **settings)(text).logits
        want = memwrap.wrap(build("qwen3"), "window", window_size=8, **settings)(text).logits
    assert_close(got, want, 1e-5)


def test_the_output_scale_learns_from_zero() -> None:
    """All else gets its first gradient one step later."""
    model = memwrap.wrap(build("llama"), "lact", segment_size=8).train()
    text = ids(2, 40)
    model(text, labels=text).loss.backward()
    grads = gradients(model)
    moving = {n for n, g in grads.items() if ".networks." in n and float(g.abs().max()) > 0}
    assert {n.rpartition(".")[2] for n in moving} == {"read"}
    with torch.no_grad():
        for network in model.memories["lact"].networks.values():
            network.read.normal_(std=0.1)
    model(text, labels=text).loss.backward()
    grads = gradients(model)
    still = [n for n, g in grads.items() if ".networks." in n and not float(g.abs().max()) > 0]
    assert not still


def test_states_hold_what_their_settings_need() -> None:
    def names(**settings: Any) -> set[str]:
        model = memwrap.wrap(build("llama"), "lact", segment_size=8, layers=[1], **settings)
        layers = model.new_state(2).memories["lact"]["layers"]
        assert set(layers["0"]) == {"window"}
        return set(layers["1"]) - {"window", "written"}

    three = {f"{n}{i}" for n in "wm" for i in range(3)}
    assert names() == three
    assert names(momentum=False) == {"w0", "w1", "w2"}
    assert names(row_norm="pre") == three | {"t0", "t1", "t2"}
    assert names(step="titans", network="linear", row_norm="pre") == {"w0", "m0"}


def test_rows_begin_with_the_learned_network_and_go_ways_of_their_own() -> None:
    model = wrapped("lact")
    memory: Any = model.memories["lact"]
    layer = memory.networks["0"]
    text = ids(2, 19)
    with torch.no_grad():
        state = model.read(text)
        tree = state.memories["lact"]["layers"]["0"]
        empty = model.new_state(2).memories["lact"]["layers"]["0"]
        for i, first in enumerate(layer.first):
            assert torch.equal(empty[f"w{i}"], first.expand(2, -1, -1, -1))
            assert error_of(tree[f"w{i}"][0], first) > 1e-2
            assert error_of(tree[f"w{i}"][1], tree[f"w{i}"][0]) > 1e-2
            norm = tree[f"w{i}"].norm(dim=-1)
            assert_close(norm, first.norm(dim=-1).expand_as(norm), 1e-4)


def test_a_part_that_closes_is_a_step_from_fewer_tokens() -> None:
    model = wrapped("lact")
    with torch.no_grad():
        state = model.read(ids(1, 11))
        closed = model.close_segment(state)
    before, after = (s.memories["lact"]["layers"]["0"] for s in (state, closed))
    assert error_of(after["w0"], before["w0"]) > 1e-2


def test_saved_and_loaded_with_a_state(tmp_path: Path) -> None:
    model = wrapped("lact", step="gradient", network="mlp")
    model.save_pretrained(tmp_path / "model")
    loaded = memwrap.load(tmp_path / "model", build("llama")).eval()
    text = ids(1, 30)
    with torch.no_grad():
        state = model.read(text)
        state.save(tmp_path / "state.safetensors")
        again = memwrap.MemoryState.load(tmp_path / "state.safetensors")
        kept = dict(tree_leaves(again.memories["lact"]))
        for name, tensor in tree_leaves(state.memories["lact"]):
            assert torch.equal(kept.pop(name), tensor), name
        assert not kept
        want = model(ids(1, 5, seed=3), cache=state).logits
        assert torch.equal(loaded(ids(1, 5, seed=3), cache=again).logits, want)


def test_titans_errors_shrink_by_the_keys_products() -> None:
    """The same keys and values again and again: what is read misses the values by
    `(1 - 2 rate K K^T)` times what it missed them by before."""
    torch.manual_seed(0)
    rule = fast_weights.StepRule(network="linear", step="titans")
    key = F.normalize(torch.randn(1, 1, 6, 8, dtype=torch.float64), dim=-1)
    value = torch.randn(1, 1, 6, 8, dtype=torch.float64)
    memory = fast_weights.FastMemory((torch.zeros(1, 1, 8, 8, dtype=torch.float64),))
    rates = torch.full((1, 1, 6, 1), 0.2, dtype=torch.float64)
    gates = fast_weights.WriteGates(rates, None, torch.zeros_like(rates[..., 0]))
    less, want = torch.eye(6, dtype=torch.float64) - 0.4 * key @ key.mT, value
    for _ in range(4):
        missed = value - fast_weights.read("linear", memory.weights, key)
        assert_close(missed, want, 1e-12)
        memory = fast_weights.write(rule, memory, key, value, gates, memory.weights)
        want = less @ want
    assert float(want.norm()) < 0.7 * float(value.norm())


def test_a_network_that_adds_its_input_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="'mlp' adds its input"):
        memwrap.wrap(build("deepseek_v2"), "lact", segment_size=8, network="mlp")
