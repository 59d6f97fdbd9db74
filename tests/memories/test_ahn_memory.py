"""AHN against its formulas written as loops, the windows that training draws, and its settings."""

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
from memwrap.state.trees import tree_leaves
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, gradients, ids, wrapped

FORMS = ("gated_delta", "delta", "gated")
VARIANTS: list[dict[str, Any]] = [
    {"form": "gated_delta"},
    {"form": "gated_delta", "states": "kv_head", "window_size": 3},
    {"form": "delta", "window_size": 5, "num_sinks": 0},
    {"form": "gated", "window_size": 1, "layers": [1]},
    {"form": "gated", "states": "kv_head", "rotate": False},
    {"form": "gated_delta", "window_size": 9, "train_windows": [2, 9]},
]


def one_layer(**settings: Any) -> tuple[Any, Any]:
    """As `bare_attention`, with random parameters in the memory."""
    base, attention = bare_attention()
    model = memwrap.wrap(base, "ahn", segment_size=8, **settings)
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model, attention


def rotated(x: Tensor, place: int) -> Tensor:
    """`(8,)` at a place, theta 10000."""
    angles = place * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def recurrence(own: Any, form: str, state: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Strength of the write and decay of a token, by the paper's formulas."""
    if form == "delta":
        return torch.sigmoid(own.write[state] @ x), torch.ones(())
    raw = own.write[state] @ x
    step = F.softplus((raw if form == "gated" else own.forget[state] @ x) + own.bias[state])
    decay = torch.exp(-own.rate[state].exp() * step)
    return (step if form == "gated" else torch.sigmoid(raw)), decay


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("states", ["query_head", "kv_head"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_its_formula(form: str, states: str, rotate: bool) -> None:
    """Token by token and head by head: what has left the window, and is no sink, is in the state
    that a query reads, and the output is added to the softmax over window and sinks."""
    window, sinks, count = 5, 2, 21
    settings = {"form": form, "states": states, "rotate": rotate}
    model, attention = one_layer(window_size=window, num_sinks=sinks, **settings)
    own = model.memories["ahn"].networks["0"]
    x = torch.randn(1, count, 32)
    with torch.no_grad():
        got = (model(inputs_embeds=x).logits - x)[0].unflatten(-1, (4, 8))
        q, k, v = (
            p(x[0]).unflatten(-1, (-1, 8)).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )

        def turned(row: Tensor, place: int) -> Tensor:
            return rotated(row, place) if rotate else row

        near, far = torch.zeros(2, count, 4, 8)
        for h in range(4):
            kv = h // 2
            index = h if states == "query_head" else kv
            S = torch.zeros(8, 8)
            for t in range(count):
                # Sinks are seen at the distance of a full cache once the window has passed them.
                last = min(t, window + sinks - 1)
                seen = [(i, last - i) for i in range(min(sinks, t - window + 1))]
                seen += [(i, t - i) for i in range(max(0, t - window + 1), t + 1)]
                query = [rotated(q[h, t], distance) for _, distance in seen]
                scores = torch.stack([a @ k[kv, i] for a, (i, _) in zip(query, seen, strict=True)])
                near[t, h] = (scores * 8**-0.5).softmax(0) @ v[kv, [i for i, _ in seen]]
                left = t - window
                if left >= sinks:
                    strength, decay = recurrence(own, form, index, x[0, left])
                    key = turned(k[kv, left], left)
                    key = key / key.norm()
                    S = decay * S
                    change = v[kv, left] - (0 if form == "gated" else key @ S)
                    S = S + strength * key[:, None] * change
                unit = turned(q[h, t], t)
                far[t, h] = unit / unit.norm() @ S * (1 if form == "gated" else 8**-0.5)
        gate = F.silu(x[0] @ own.read.T + (own.read_bias if form == "gated" else 0))[..., None]
        # Mamba-2: first the gate, then one norm over all heads.
        far = (far * gate).flatten(1) if form == "gated" else far
        far = far * torch.rsqrt(far.square().mean(-1, keepdim=True) + 1e-5) * own.norm
        far = far.view(count, 4, 8) * (1 if form == "gated" else gate)
        for t in range(count):
            want = near[t] + torch.einsum("hi,hij->hj", far[t], own.out)
            assert_close(got[t], want, 1e-4, f"token {t}")


CASES = crossed(VARIANTS, ["llama", "gemma3", "gpt_neox", "opt", "mistral"], 2)


@pytest.mark.parametrize(("variant", "family"), CASES)
def test_pieces_and_padding(family: str, variant: dict[str, Any]) -> None:
    assert_pieces_and_padding(wrapped("ahn", family, **variant), (27, 18))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_segments_do_not_show(variant: dict[str, Any]) -> None:
    text = ids(1, 21)
    with torch.no_grad():
        want = wrapped("ahn", segment_size=8, **variant)(text).logits
        for size in (1, 5, 32):
            assert_close(wrapped("ahn", segment_size=size, **variant)(text).logits, want)


def test_before_training_it_is_the_window() -> None:
    text = ids(2, 40)
    settings = {"segment_size": 8, "window_size": 6, "num_sinks": 2}
    with torch.no_grad():
        got = memwrap.wrap(build("qwen3"), "ahn", **settings)(text).logits
        want = memwrap.wrap(build("qwen3"), "window", **settings)(text).logits
        assert_close(got, want, 1e-5)
        # A text that fits into the window is read as the base reads it, whatever was learned.
        wide = wrapped("ahn", "qwen3", window_size=40)
        assert_close(wide(text).logits, build("qwen3")(text).logits)


def test_trained_with_one_window_it_reads_with_another(tmp_path: Path) -> None:
    wrapped("ahn", window_size=6).save_pretrained(tmp_path)
    model = memwrap.wrap(build("llama"), "ahn", segment_size=8, window_size=12, num_sinks=4)
    assert model.take_over(tmp_path) == []
    with torch.no_grad():
        want = wrapped("ahn", window_size=12, num_sinks=4)(ids(1, 40)).logits
        assert torch.equal(model.eval()(ids(1, 40)).logits, want)


def test_branches() -> None:
    model = wrapped("ahn", segment_size=8, window_size=6, num_sinks=2)
    memory, text = model.memories["ahn"], ids(1, 30)
    with torch.no_grad():
        both = model(text).logits
        with memory.only("window"):
            window = model(text).logits
        settings = {"segment_size": 8, "window_size": 6, "num_sinks": 2}
        assert_close(window, memwrap.wrap(build("llama"), "window", **settings)(text).logits, 1e-5)
        with memory.only("recurrent"):
            assert error_of(model(text).logits, both) > 1e-2
    assert error_of(window, both) > 1e-2


def test_training_draws_windows() -> None:
    """Every row of a batch has a window of its own, drawn as it begins, that stays for the text;
    a row reads as a model with that window reads it."""
    model = wrapped("ahn", window_size=12, train_windows=[3, 5, 12]).train()
    text = ids(16, 30)
    torch.manual_seed(3)
    state = model.new_state(16)
    sizes = state.memories["ahn"]["layers"]["0"]["window"]["sizes"]
    assert set(sizes.tolist()) == {3, 5, 12}
    assert torch.equal(state.memories["ahn"]["layers"]["1"]["window"]["sizes"], sizes)
    with torch.no_grad():
        first = model(text[:, :11], cache=state).logits
        got = torch.cat([first, model(text[:, 11:], cache=state).logits], 1)
        for size in (3, 5, 12):
            rows = sizes == size
            want = wrapped("ahn", window_size=size)(text[rows]).logits
            assert_close(got[rows], want, 1e-5, f"window of {size}")
        model.eval()
        assert_close(model(text).logits, wrapped("ahn", window_size=12)(text).logits, 1e-5)
    assert torch.equal(state.memories["ahn"]["layers"]["0"]["window"]["sizes"], sizes)


def test_only_the_recurrence_is_trained_and_all_of_it() -> None:
    for form in FORMS:
        model = wrapped("ahn", form=form, window_size=4).train()
        model.backbone.requires_grad_(False)
        model(ids(2, 30), labels=ids(2, 30)).loss.backward()
        found = gradients(model)
        assert found.keys() == {n for n, _ in model.named_parameters() if n.startswith("memory")}
        assert all(float(g.abs().max()) > 0 for g in found.values())
        still = [p for g in model.memories["ahn"].optimizer_groups() for p in g["params"]]
        assert len(still) == (0 if form == "delta" else 4)


def test_layers_with_a_shorter_window_have_no_recurrence() -> None:
    """gemma3's first layer sees 5 tokens itself; mistral's all do, so that all get one."""
    assert set(wrapped("ahn", "gemma3").memories["ahn"].networks) == {"1"}
    assert set(wrapped("ahn", "mistral").memories["ahn"].networks) == {"0", "1"}
    assert set(wrapped("ahn", "gemma3", layers=[0]).memories["ahn"].networks) == {"0"}


def test_what_is_kept() -> None:
    def shapes(**settings: Any) -> dict[str, tuple[int, ...]]:
        layer = wrapped("ahn", **settings).read(ids(2, 20)).memories["ahn"]["layers"]["0"]
        return {name: tuple(t.shape) for name, t in tree_leaves(layer)}

    found = shapes()
    assert found["S"] == (2, 4, 8, 8)
    assert found["window.recent.gates"] == (2, 4, 10, 2)
    assert found["window.recent.key"] == (2, 2, 10, 8)
    assert found["window.sink_key"] == (2, 2, 2, 8)
    shared = shapes(states="kv_head", form="delta")
    assert (shared["S"], shared["window.recent.gates"]) == ((2, 2, 8, 8), (2, 2, 10, 1))
    # Table 1 of the paper: 3 D N_q + H^2 N_q numbers a layer, and a few a head.
    model = memwrap.wrap(build("llama"), "ahn")
    count = sum(p.numel() for p in model.memories["ahn"].networks["0"].parameters())
    assert count == 3 * 32 * 4 + 8 * 8 * 4 + 2 * 4 + 8
