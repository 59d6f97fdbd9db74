"""LoLCATs against its formula written as loops, and its two stages of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from one_layer import bare_attention
from support import assert_pieces_and_padding
from torch import Tensor

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import assert_close, error_of, gradients, ids, wrapped


def one_layer(**settings: Any) -> tuple[Any, Any]:
    """As `bare_attention`, with random parameters in the memory."""
    base, attention = bare_attention()
    model = memwrap.linearize(base, "lolcats", segment_size=8, **settings)
    with torch.no_grad():
        for parameter in model.memory_parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model, attention


def rotated(x: Tensor) -> Tensor:
    """`(H, T, 8)` at places 0 .. T - 1, theta 10000."""
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    angles = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def maps(x: Tensor, weight: Tensor) -> Tensor:
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


@pytest.mark.parametrize("key_maps", ["query_head", "kv_head"])
@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_is_its_formula(key_maps: str, affine: bool) -> None:
    """Window and older tokens under one normaliser, places counted from the document's start."""
    window = 5
    model, attention = one_layer(window_size=window, key_maps=key_maps, affine=affine)
    own = model.memories["lolcats"].maps["0"]
    x = torch.randn(1, 21, 32)
    with torch.no_grad():
        got = (model(inputs_embeds=x).logits - x)[0].unflatten(-1, (4, 8))
        q, k, v = (
            p(x[0]).unflatten(-1, (-1, 8)).transpose(0, 1)
            for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = rotated(q), rotated(k)
        for h in range(4):
            share = torch.sigmoid(own.window[h])
            rest = 1 - share if affine else 1.0
            key_map = own.key[h if key_maps == "query_head" else h // 2]
            for t in range(21):
                scores = (k[h // 2, : t + 1] @ q[h, t]) * 8**-0.5
                start = max(0, t - window + 1)
                near = share * torch.exp(scores[start:] - scores[start:].max())
                far = rest * (maps(k[h // 2, :start], key_map) @ maps(q[h, t], own.query[h]))
                weights = torch.cat([far, near])
                want = weights @ v[h // 2, : t + 1] / weights.sum()
                assert_close(got[t, h], want, 1e-4, f"token {t} of head {h}")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt", "smollm3"])
@pytest.mark.parametrize("settings", [{}, {"key_maps": "kv_head", "layers": [1], "affine": True}])
def test_pieces_and_padding(family: str, settings: dict[str, Any]) -> None:
    assert_pieces_and_padding(wrapped("lolcats", family, **settings), (27, 18))


@pytest.mark.parametrize("size", [1, 5, 32])
def test_segments_do_not_show(size: int) -> None:
    text = ids(1, 30)
    with torch.no_grad():
        want = wrapped("lolcats", segment_size=8)(text).logits
        assert_close(wrapped("lolcats", segment_size=size)(text).logits, want)


def test_transfer_forces_the_teacher() -> None:
    """In training every layer passes on what the softmax gives, segment by segment; the maps get
    the gradient of the error and nothing else does."""
    base, text = build("llama"), ids(2, 24)
    with torch.no_grad():
        teacher = [base(piece).logits for piece in text.split(8, 1)]
    model = wrapped("lolcats", base=base, stage="transfer", loss_weight=1.0)
    model.backbone.requires_grad_(False)
    model.train()
    logits = model(text).logits
    assert_close(logits.detach(), torch.cat(teacher, 1), 1e-5)
    out = model(text, labels=text, use_cache=True)
    with torch.no_grad():
        plain = wrapped("lolcats", base=build("llama"), stage="transfer", loss_weight=0.0).train()
        assert float(out.loss.detach()) > float(plain(text, labels=text).loss) + 1e-3
    out.loss.backward()
    found = gradients(model)
    assert found.keys() == {n for n, _ in model.named_parameters() if n.startswith("memory")}
    assert all(float(g.abs().max()) > 0 for g in found.values())
    assert float(out.cache.memories["lolcats"]["layers"]["0"]["S"].abs().max()) == 0
    # Evaluated, it is the converted model, with all of its memory.
    with torch.no_grad():
        want = wrapped("lolcats", base=build("llama"))(text).logits
        assert_close(model.eval()(text).logits, want, 1e-6)
        assert error_of(want, torch.cat(teacher, 1)) > 1e-3


def test_transfer_brings_the_error_down() -> None:
    torch.manual_seed(0)
    model = wrapped("lolcats", stage="transfer", segment_size=16, loss_weight=1.0)
    plain = wrapped("lolcats", stage="transfer", segment_size=16, loss_weight=0.0).train()
    model.backbone.requires_grad_(False)
    model.train()
    text = ids(4, 32)
    with torch.no_grad():
        language = float(plain(text, labels=text).loss)
    optimizer = torch.optim.Adam(list(model.memory_parameters()), lr=3e-2)
    losses = []
    for _ in range(40):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) - language)
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_learned_and_kept() -> None:
    model = wrapped("lolcats")
    shapes = {
        n.rpartition(".")[2]: tuple(p.shape) for n, p in model.named_parameters() if "maps.0" in n
    }
    assert shapes == {"query": (4, 8, 4), "key": (4, 8, 4), "window": (4,)}
    figures = memwrap.linearize(build("llama"), "lolcats").memories["lolcats"].figures()
    assert_close(figures["window_weight"], torch.full((2, 4), 0.1), 1e-6)
    layers = model.read(ids(2, 20)).memories["lolcats"]["layers"]
    assert layers["0"]["S"].shape == (2, 4, 8, 9)
    shared = wrapped("lolcats", key_maps="kv_head").read(ids(2, 20)).memories["lolcats"]["layers"]
    assert shared["0"]["S"].shape == (2, 2, 8, 9)
