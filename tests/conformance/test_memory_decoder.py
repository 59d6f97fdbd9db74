"""Conformance of the Memory Decoder: its loss and its mixture, through the public ops."""

from __future__ import annotations

import pytest
import torch
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case

from memwrap.ops.imitation import imitation_loss, imitation_losses, naive
from memwrap.ops.interpolation import interpolate, interpolate_logits

OP = Tolerances(reference={"": 1e-6}, float32={"": 2e-6}, exact={"": 1e-12})


def run(case: Case) -> Got:
    settings, t = case.settings, case.tensors
    rows, columns, vocabulary = t["logits"].shape
    share, weight, heat = (settings[n] for n in ("beta", "lambda", "temperature"))
    # `k` says how the distributions were drawn, `seed` how everything was.
    case.holds(B=rows, T=columns, V=vocabulary, k=settings["k"], seed=settings["seed"])
    assert settings["k"] <= vocabulary and settings["seed"] == 0
    probs = t["knn_probs"] / t["knn_probs"].sum(-1, keepdim=True)
    leaves = case.leaves("logits")
    following = t["labels"][:, 1:]
    wanted = following != -100
    logits, targets = leaves["logits"][:, :-1][wanted], following[wanted]
    apart, surprise = imitation_losses(logits, targets, probs)
    loss = imitation_loss(logits, targets, probs, share)
    loss.backward()
    joint = interpolate_logits(t["base_logits"], t["mem_logits"], weight, heat)
    plain = ((1 - weight) * t["base_logits"].softmax(-1)
             + weight * (t["mem_logits"] / heat).softmax(-1)).log()  # fmt: skip
    every = torch.arange(vocabulary).expand_as(probs)
    mixed = interpolate(logits.detach(), -probs.log(), every, weight, 1.0).log_softmax(-1)
    return {
        "kl": apart[None], "ce": surprise[None],
        "loss": [loss[None], naive(logits, targets, probs, share)[None]],
        "joint": [joint.log_softmax(-1), plain],
        "eval_nll": -mixed.gather(1, targets[:, None]).sum()[None],
        **gradients_of(leaves),
    }  # fmt: skip


def check(case: Case) -> None:
    compare(case, run(case), OP)


@both_precisions
@pytest.mark.parametrize("name", names_of("memory_decoder"))
def test_memory_decoder(name: str, dtype: torch.dtype) -> None:
    check(read_case("memory_decoder", name, dtype))
