"""Forms and settings of Liger that the shared invariants, run on one config, do not meet."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from one_layer import bare_attention
from support import assert_pieces_and_padding
from torch import Tensor, nn

import memwrap
from memwrap.memories.liger import Form
from memwrap.ops import backend, delta, gla
from memwrap.ops.gla.features import features
from memwrap.testing.families import build
from memwrap.testing.helpers import (
    SEGMENT,
    assert_close,
    assert_same_gradients,
    error_of,
    gradients,
    ids,
    wrapped,
)

FORMS = get_args(Form)

VARIANTS: list[dict[str, Any]] = [
    *[{"form": form} for form in FORMS],
    {"form": "gla", "window_size": 0},
    {"form": "gla", "feature_map": "hedgehog", "rotate": True, "num_sinks": 0},
    {"form": "gla", "feature_map": "elu", "normaliser": True},
    {"form": "gsa", "num_slots": 4},
    {"form": "linear", "feature_map": "taylor", "rotate": True},
    {"form": "hgrn2", "layers": [1], "other_window_size": 11},
    {"form": "kda", "feature_map": "hedgehog", "rotate": True},
    {"form": "gated_delta", "num_memories": 3},
    {"form": "gdn2", "num_memories": 2, "top_k": 1, "layers": [1]},
    {"form": "linear", "num_memories": 3, "shared": False, "window_size": 0},
    {"form": "gsa", "num_memories": 2, "top_k": 1, "rotate": True},
]
FAMILIES = ("llama", "gemma3", "gpt_neox", "qwen3", "opt", "phi3", "smollm3", "granite")
# Each variant on one family; those of another than llama on llama too, which is slow.
CASES = [
    pytest.param(
        family, variant, id="-".join([family, *map(str, variant.values())]),
        marks=() if family == FAMILIES[index % len(FAMILIES)] else pytest.mark.slow,
    )
    for index, variant in enumerate(VARIANTS)
    for family in sorted({"llama", FAMILIES[index % len(FAMILIES)]})
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_pieces_and_padding(family: str, variant: dict[str, Any]) -> None:
    assert_pieces_and_padding(wrapped("liger", family, **variant), (27, 18))


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=pytest.mark.slow) if index % 2 else v
     for index, v in enumerate(VARIANTS)],
    ids=lambda v: "-".join(map(str, v.values())),
)  # fmt: skip
def test_segments_do_not_show(variant: dict[str, Any]) -> None:
    text = ids(1, 21)
    with torch.no_grad():
        want = wrapped("liger", segment_size=32, **variant)(text).logits
        for size in (1, 7):
            assert_close(wrapped("liger", segment_size=size, **variant)(text).logits, want)


def one_layer(**settings: Any) -> tuple[Any, nn.Module]:
    base, attention = bare_attention()
    settings = {"num_sinks": 0, "segment_size": 8, **settings}
    return memwrap.linearize(base, "liger", **settings), attention


def heads(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain queries, keys and values `(B, H, T, 8)`."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return tuple(p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in projections)  # type: ignore[return-value]


@pytest.mark.parametrize("form", ["linear", "retnet", "delta", "gated_delta", "kda", "gdn2"])
def test_a_layer_is_its_formula(form: str) -> None:
    """The forms for which there are no reference vectors, by hand."""
    model, attention = one_layer(form=form, window_size=0)
    x = torch.randn(2, 21, 32) * 2
    with torch.no_grad(), backend("naive"):
        got = model(inputs_embeds=x).logits - x
        q, k, v = heads(attention, x)
        if form == "linear":
            scores = (
                features(q, "softmax") @ features(k, "softmax").repeat_interleave(2, 1).mT
            ).tril()
            want = scores / scores.sum(-1, keepdim=True) @ v.repeat_interleave(2, 1)
        elif form == "retnet":
            log = torch.log(1 - 2.0 ** (-5 - torch.arange(2)))[None, :, None].expand(2, -1, 21)
            want, _ = gla.scan(features(q, "softmax"), features(k, "softmax"), v, log, scale=1.0)
        else:
            log = {"delta": None, "gated_delta": F.logsigmoid(k.mean(-1)) / 16}
            gate = log.get(form, F.logsigmoid(k) / 16)
            want, _ = delta.scan(q, k, v, k.mean(-1).sigmoid(), gate, scale=1.0, l2norm=True)
    assert_close(got, want.transpose(1, 2).flatten(2), 1e-5)


def test_gates_of_their_own_by_hand() -> None:
    """GDN-2 with maps that were learned: strengths are of KV heads and of channels, in order."""
    model, attention = one_layer(form="gdn2", window_size=0)
    network: Any = model.memories["liger"].networks["0"]
    x = torch.randn(2, 21, 32)
    with torch.no_grad(), backend("naive"):
        for parameter in network.parameters():
            parameter.normal_()
        got = model(inputs_embeds=x).logits - x
        q, k, v = heads(attention, x)
        write, erase = (
            ((x @ m.T).view(2, 21, 2, 8).transpose(1, 2) + k.mean(-1, keepdim=True)).sigmoid()
            for m in (network.write, network.erase)
        )
        full: Any = {"erase": erase, "scale": 1.0, "l2norm": True}
        want, _ = delta.scan(q, k, v, write, F.logsigmoid(k) / 16, **full)
    assert_close(got, want.transpose(1, 2).flatten(2), 1e-5)


@pytest.mark.parametrize("form", ["gla", "gated_delta", "gdn2"])
def test_routed_memories_by_hand(form: str) -> None:
    """Each memory is the recurrence over the tokens that were sent to it, and no others."""
    model, _ = one_layer(form=form, num_memories=3, window_size=0)
    plain, _ = one_layer(form=form, window_size=0)
    network: Any = model.memories["liger"].networks["0"]
    x, weight = torch.randn(1, 21, 32) * 2, torch.tensor([0.5, -1.0, 2.0, 0.0])
    with torch.no_grad():
        network.router.normal_()
        network.routed_weight.copy_(weight)
        got = model(inputs_embeds=x).logits - x
        shares = (x[0] @ network.router.T).softmax(-1)
        want = plain(inputs_embeds=x).logits - x
        for m in range(3):
            others = shares.clone()
            others[:, m] = -1
            sent = shares[:, m] > others.sort(-1).values[:, -2]  # among the first two
            read = plain(inputs_embeds=x[:, sent]).logits - x[:, sent]
            share = shares[sent, m] / shares[sent].sort(-1).values[:, -2:].sum(-1)
            scaled = read.unflatten(-1, (4, 8)) * (share[:, None] * weight)[..., None]
            want[:, sent] += scaled.flatten(-2)
    assert_close(got, want, 1e-5)


@pytest.mark.slow
def test_new_parameters_start_as_if_not_there() -> None:
    """Routed memories beside the shared one add nothing, GDN-2 starts as KDA; and a single memory
    that is not beside another one is the recurrence as it is."""
    base, text = build("llama"), ids(2, 30)
    settings: Any = {"segment_size": 8, "window_size": 5}

    def logits(**own: Any) -> Tensor:
        model = memwrap.linearize(base, "liger", **settings, **own)
        with torch.no_grad():
            found = model(text).logits
        memwrap.unwrap(model)
        return found

    for form in FORMS:
        want = logits(form=form)
        assert_close(logits(form=form, num_memories=3), want, 1e-6)
        alone = logits(form=form, num_memories=1, top_k=1, shared=False)
        assert_close(alone, want, 1e-6)
    assert_close(logits(form="gdn2"), logits(form="kda"), 1e-6)
    assert error_of(logits(form="gated_delta"), logits(form="kda")) > 1e-4


def test_the_router_is_kept_from_using_few_memories() -> None:
    """Its loss is there in training alone, by row, and as large as the page says."""
    text, losses = ids(2, 24), {}
    for weight in (0.0, 1.0):
        model = wrapped("liger", num_memories=4, balance_weight=weight, segment_size=24)
        with torch.no_grad():
            for network in model.memories["liger"].networks.values():
                network.router.zero_()  # all tie: the first two get everything, evenly weighted
        losses[weight] = [model.train(mode)(text, labels=text).loss for mode in (False, True)]
    assert torch.equal(losses[1.0][0], losses[0.0][0])
    # 4 memories, each probability 1/4, shares 1, 1, 0, 0.
    assert (losses[1.0][1] - losses[0.0][1]).item() == pytest.approx(2.0, abs=1e-5)
    model.zero_grad()
    losses[1.0][1].backward()
    assert all(
        float(n.router.grad.abs().max()) > 0 for n in model.memories["liger"].networks.values()
    )


def test_the_softmax_alone_is_the_window_memory() -> None:
    """`window_size` keys are seen, not one more; sinks stand where the window puts them."""
    text = ids(2, 40)
    for family in ("llama", "gemma3", "gpt2"):
        base = build(family)
        model = memwrap.linearize(
            base, "liger", segment_size=8, window_size=11, num_sinks=2, window_weight=1.0,
            recurrent_weight=0.0,
        )  # fmt: skip
        with torch.no_grad():
            got = model(text).logits
            memwrap.unwrap(model)
            other = memwrap.wrap(base, "window", segment_size=8, window_size=11, num_sinks=2)
            assert_close(got, other(text).logits, 1e-5)


def test_beyond_the_window_only_the_recurrence_reaches() -> None:
    model, _ = one_layer(window_size=6)
    x = torch.randn(1, 30, 32)
    other = x.clone()
    other[:, 20] += 1
    memory = model.memories["liger"]
    with torch.no_grad():
        with memory.only("window"):
            a, b = model(inputs_embeds=x).logits, model(inputs_embeds=other).logits
        assert error_of(b[:, 25], a[:, 25]) > 1e-3  # 25 - 20 < 6
        assert torch.equal(a[:, 26:], b[:, 26:])
        a, b = model(inputs_embeds=x).logits, model(inputs_embeds=other).logits
        assert error_of(b[:, 29], a[:, 29]) > 1e-4


def test_no_parameter_is_added_and_all_projections_learn() -> None:
    for form in FORMS:
        model = wrapped("liger", form=form).train()
        # 2 layers, maps to 2 KV heads of 8 channels from 32
        count = sum(p.numel() for p in model.memory_parameters())
        assert count == (2 * 2 * 16 * 32 if form == "gdn2" else 0)
        text = ids(2, 30)
        model(text, labels=text).loss.backward()
        found = gradients(model)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            own = [g for n, g in found.items() if name in n]
            assert own and all(float(g.abs().max()) > 0 for g in own), (form, name)


def test_heads_share_a_state() -> None:
    """One matrix a KV head in float32, whatever the model's dtype."""
    model = wrapped("liger", base=build("llama").to(torch.bfloat16))
    tree = model.read(ids(2, 20)).memories["liger"]["layers"]["0"]
    assert tree["S"].shape == (2, 2, 8, 8) and tree["S"].dtype == torch.float32
    assert tree["window"]["recent"]["key"].shape == (2, 2, 4, 8)
    routed = wrapped("liger", num_memories=3).read(ids(2, 20)).memories["liger"]["layers"]
    assert routed["0"]["S"].shape == (2, 4, 2, 8, 8)
    slots = wrapped("liger", form="gsa", num_slots=4).read(ids(1, 9)).memories["liger"]["layers"]
    assert slots["0"]["K"].shape == (1, 2, 8, 4) and slots["0"]["V"].shape == (1, 2, 4, 8)


def test_other_layers_keep_their_attention() -> None:
    """What is not converted sees its whole window: as much as the base, if the text fits."""
    base, text = build("llama"), ids(1, 37)
    with torch.no_grad():
        want = base(text).logits
        model = memwrap.linearize(
            base, "liger", segment_size=8, layers=[1], window_size=40, window_weight=1.0,
            recurrent_weight=0.0, other_window_size=40,
        )  # fmt: skip
        assert_close(model(text).logits, want)
        assert "S" not in model.read(text).memories["liger"]["layers"]["0"]


def test_rows_without_a_window() -> None:
    """In training, and in the rows it hits, the recurrence is read alone."""
    text, model = ids(64, SEGMENT - 1), wrapped("liger")
    memory = model.memories["liger"]
    with torch.no_grad():
        both = model(text).logits
        with memory.only("recurrent"):
            alone = model(text).logits
        assert error_of(alone, both) > 1e-3
        with memory.only("recurrent", 0.5):
            assert_close(model(text).logits, both, 1e-6)  # never in evaluation
            drawn = model.train()(text).logits
            with memory.only("recurrent", 0.0):
                assert_close(model(text).logits, both, 1e-6)
    # Both layers draw: a quarter of the rows is read as if there were no window.
    near = [
        int(((drawn - other).abs().amax((1, 2)) < 1e-5).sum()) for other in (alone, both)
    ]  # fmt: skip
    assert all(5 <= count <= 30 for count in near), near
    with (
        pytest.raises(ValueError, match="in every row"),
        wrapped("ahn").memories["ahn"].only("recurrent", 0.5),
    ):
        pass


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_window_dropout_under_checkpointing() -> None:
    """A segment that is run again draws the same rows."""
    model, text = wrapped("liger").train(), ids(4, 30)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        with model.memories["liger"].only("recurrent", 0.5):
            loss = model(text, labels=text).loss
        loss.backward()
        found.append(gradients(model))
    assert_same_gradients(found[1], found[0], 1e-6)


def test_what_does_not_fit_is_explained() -> None:
    base = build("llama")
    with pytest.raises(ValueError, match="num_slots is 3; it must divide"):
        memwrap.linearize(base, "liger", form="gsa", num_slots=3)
    with pytest.raises(ValueError, match=r"'infini' stands beside.*wrap"):
        memwrap.linearize(base, "infini")
    with pytest.raises(ValueError, match="names layer 7"):
        memwrap.linearize(base, memwrap.LigerConfig(layers=[7]))
    assert memwrap.linearize(base).memory_configs[0].form == "gla"
