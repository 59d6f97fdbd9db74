"""Routing of tokens to memories: choices, weights, masks, and how uneven they are."""

from __future__ import annotations

import torch

from memwrap.ops.mixture import Routing

DOUBLE = torch.float64


def test_the_first_of_equal_memories_is_chosen() -> None:
    logits = torch.tensor([[[0.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]], dtype=DOUBLE)
    routing = Routing.of(logits, 2)
    assert routing.chosen.tolist() == [[[1, 2], [0, 1]]]
    assert routing.weights.tolist() == [[[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0]]]
    one = Routing.of(logits, 1)
    assert one.chosen.tolist() == [[[1], [0]]] and one.weights.sum(-1).tolist() == [[1, 1]]


def test_states_take_in_what_was_sent_to_them() -> None:
    """Two rows of three tokens, two memories: rows of states stand by text, the shared one last."""
    logits = torch.tensor([[[1.0, 0.0]] * 2 + [[0.0, 1.0]], [[0.0, 1.0]] * 3])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    routing = Routing.of(logits, 1)
    first, second = [[1, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 1]]
    assert routing.mask(valid, False).long().tolist() == first + second
    assert routing.mask(valid, True).long().tolist() == [*first, [1, 1, 1], *second, [0, 1, 1]]


def test_imbalance_goes_from_k_to_the_number_of_memories() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    even = torch.eye(4, dtype=DOUBLE)[None] * 0.01
    assert abs(float(Routing.of(even, 1).imbalance(valid)) - 1) < 1e-12
    one = torch.tensor([50.0, 0, 0, 0], dtype=DOUBLE).expand(1, 4, 4)
    assert abs(float(Routing.of(one, 1).imbalance(valid)) - 4) < 1e-12
    # Padding does not count, and a row of nothing else has no loss.
    logits = torch.cat([one, even], 1)
    valid = torch.tensor([[True] * 4 + [False] * 4, [False] * 8])
    got = Routing.of(logits.expand(2, -1, -1), 1).imbalance(valid)
    assert abs(float(got[0]) - 4) < 1e-12 and float(got[1]) == 0


def test_the_choice_has_no_gradient_but_weights_and_imbalance_have() -> None:
    logits = torch.randn(2, 5, 3, dtype=DOUBLE, requires_grad=True)
    valid, read = torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 3, 2, 5, 4, dtype=DOUBLE)
    assert torch.autograd.gradcheck(lambda x: Routing.of(x, 2).mixed(read), [logits])
    assert torch.autograd.gradcheck(lambda x: Routing.of(x, 2).imbalance(valid), [logits])
