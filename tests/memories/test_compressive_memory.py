"""Variants of the Compressive memory that the shared invariants, run on one config, do not meet."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support import assert_pieces_and_padding

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import SEGMENT, assert_close, error_of, gradients, ids, wrapped

VARIANTS = [
    {"compression": c, "store": s, "positions": p}
    for c, s, p in product(
        ("mean", "max", "conv", "dilated_conv", "most_used"),
        ("kv", "hidden"),
        ("index", "timeline"),
    )
]
# Each variant on llama or on another family; on both it is slow.
OTHERS = ("gpt2", "phi3", "gemma3", "smollm3", "opt", "gpt_neox")
CASES = [
    pytest.param(
        family, v, id="-".join([family, *v.values()]),
        marks=() if index.bit_count() % 2 == turn else pytest.mark.slow,
    )
    for index, v in enumerate(VARIANTS)
    for turn, family in enumerate(("llama", OTHERS[index % len(OTHERS)]))
]  # fmt: skip


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_pieces_and_padding(family: str, variant: dict) -> None:
    assert_pieces_and_padding(wrapped("compressive", family, **variant))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_the_memory_matters(variant: dict) -> None:
    """What stands more than the uncompressed memory back still changes the logits."""
    model = wrapped("compressive", "llama", **variant)
    text = ids(1, 5 * SEGMENT)
    other = text.clone()
    other[:, :SEGMENT] = ids(1, SEGMENT, seed=9)
    with torch.no_grad():
        a, b = model(text).logits, model(other).logits
    assert error_of(b[:, -SEGMENT:], a[:, -SEGMENT:]) > 1e-4


@pytest.mark.parametrize("store", ["kv", "hidden"])
@pytest.mark.parametrize("loss", ["attention", "autoencoding"])
def test_only_the_compressor_learns_from_its_loss(store: str, loss: str) -> None:
    base = build("llama")
    settings = {"compression": "conv", "store": store, "loss": loss, "bptt_segments": 1}
    text = ids(2, 6 * SEGMENT)

    def run(weight: float) -> dict[str, torch.Tensor]:
        model = wrapped("compressive", base=base, loss_weight=weight, **settings).train()
        model(text, labels=text).loss.backward()
        found = gradients(model)
        memwrap.unwrap(model)
        return found

    with_loss, without = run(1.0), run(0.0)
    for name, gradient in without.items():
        if name.startswith("backbone"):
            assert torch.equal(with_loss[name], gradient), name
    own = [n for n in with_loss if n.startswith("memory")]
    assert own and all(float(with_loss[n].abs().max()) > 0 for n in own)
    # The language model's loss alone gives it nothing: the memory is cut between segments.
    assert all(float(without[n].abs().max()) == 0 for n in own if n in without)


def test_the_loss_is_added_in_training_only() -> None:
    model = wrapped("compressive", "llama", compression="conv", bptt_segments=1)
    plain = wrapped("compressive", "llama", compression="conv", bptt_segments=1, loss_weight=0.0)
    text = ids(2, 6 * SEGMENT)
    with torch.no_grad():
        assert float(model(text, labels=text).loss) == float(plain(text, labels=text).loss)
        more = float(model.train()(text, labels=text).loss)
        assert more > float(plain.train()(text, labels=text).loss) + 1e-3


@pytest.mark.slow
def test_the_compressor_learns() -> None:
    """A few steps on the reconstruction loss alone bring it down."""
    torch.manual_seed(0)
    model = wrapped("compressive", "llama", compression="conv", bptt_segments=1).train()
    plain = wrapped("compressive", "llama", compression="conv", bptt_segments=1, loss_weight=0.0)
    text = ids(4, 6 * SEGMENT)
    with torch.no_grad():
        language = float(plain(text, labels=text).loss)
    optimizer = torch.optim.Adam(list(model.memory_parameters()), lr=3e-2)
    losses = []
    for _ in range(30):
        loss = model(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) - language)
    assert losses[-1] < 0.5 * losses[0]


def test_a_new_convolution_is_mean_pooling() -> None:
    text = ids(1, 6 * SEGMENT)
    base = build("llama")
    logits = []
    for kind in ("mean", "conv"):
        config = memwrap.config_class("compressive").tiny()
        config.compression = kind
        model = memwrap.wrap(base, config)
        with torch.no_grad():
            logits.append(model(text).logits)
        memwrap.unwrap(model)
    assert_close(logits[1], logits[0], 1e-6)


def test_rows_wait_until_a_block_is_full() -> None:
    """A remainder of less than c rows stays uncompressed; counts are per row."""
    model = wrapped("compressive", "llama", compression_rate=4, memory_size=6, compressed_size=5)
    state = model.close_segment(model.read([ids(15), ids(7, seed=1)]))
    tree = state.memories["compressive"]["layers"]["0"]
    assert tree["memory"]["count"].tolist() == [7, 7]  # 15 rows: 8 left in two blocks
    assert tree["compressed"]["count"].tolist() == [2, 0]
