"""Conformance of AutoCompressor: every reference case, through the public classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, base_gradients, compare, described_backbone, names_of, read_case
from torch import Tensor

import memwrap

OUTPUTS = ("logits", "loss", "softprompt_out")
# Rounding alone, with room for another order of sums: 7e-6 and 2e-5 were met.
TOLERANCES = {"": 2e-5, "grad.": 1e-4}
BACKBONES = {"hf_llama": False, "flash_llama": False, "opt": True}


def model_of(case: Case, capacity: int) -> Any:
    learned = BACKBONES[case.settings["backbone"]]
    assert learned == (case.settings["base"]["rope_theta"] is None)
    config = memwrap.AutoCompressorConfig(
        # No segment fills: each is closed where the case cuts.
        segment_size=max(case.settings["segment_lengths"]) + 1,
        num_memory_tokens=case.settings["summary_length_k"],
        memory_size=capacity,
        accumulate=case.settings["accumulate_summary"],
        length_spread=0.0,
        bptt_segments=None,
    )
    model = memwrap.wrap(described_backbone(case), config)
    with torch.no_grad():
        model.memories["autocompressor"].tokens.copy_(case.tensors["embed_summary"])
    return model.eval()


def one_call(model: Any, case: Case, ids: Tensor, state: Any) -> tuple[list[Tensor], Tensor, Any]:
    """Logits, loss and state of one call, its segments as the case cuts them."""
    lengths = case.settings["segment_lengths"]
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    count, loss = int((targets != -100).sum()), torch.zeros(())
    logits, start = [], 0
    for index, length in enumerate(lengths):
        columns = slice(start, start + length)
        with torch.no_grad():
            logits.append(model(ids[:, columns], cache=state.clone()).logits)
        out = model(
            ids[:, columns], shift_labels=targets[:, columns], cache=state,
            num_items_in_batch=count,
        )  # fmt: skip
        loss, state = loss + out.loss, out.cache
        if index < len(lengths) - 1 or case.settings["output_softprompt"]:
            state = model.loop().close(state)
        start += length
    assert start == ids.shape[1], "the lengths do not make up the text"
    return logits, loss, state


def run(case: Case) -> dict[str, Tensor]:
    if case.about["level"] != "model" or "softprompt_out" not in case.expected:
        pytest.fail(f"{case.name}: not understood; it expects {sorted(case.expected)}")
    case.known(
        "segment_lengths", "summary_length_k", "accumulate_summary", "output_softprompt",
        "training_substeps", "backbone", "base",
    )  # fmt: skip
    case.given("input_ids", "softprompt_in", "embed_summary")
    ids, want = case.tensors["input_ids"], case.tensors["softprompt_out"]
    model = model_of(case, want.shape[1] + 3)  # places that stay empty
    memory, state = model.memories["autocompressor"], model.new_state(ids.shape[0])
    given = case.tensors.get("softprompt_in")
    if given is not None:
        given = given.clone().requires_grad_()
        state.memories["autocompressor"] = memory.prompt(given)
    logits, losses = [], []
    for part in ids.chunk(case.settings["training_substeps"], 1):
        pieces, loss, state = one_call(model, case, part, state.detach() if losses else state)
        loss.backward()
        logits += pieces
        losses.append(loss)
    results = {
        "logits": torch.cat(logits, 1),
        "loss": torch.stack(losses),
        "softprompt_out": torch.stack(memory.summaries(state)),
        "grad.embed_summary": memory.tokens.grad,
    }
    if given is not None:
        results["grad.softprompt_in"] = given.grad
    return results | base_gradients(model, case)


@pytest.mark.parametrize("name", names_of("autocompressor"))
def test_autocompressor(name: str) -> None:
    case = read_case("autocompressor", name, OUTPUTS)
    compare(case, run(case), TOLERANCES, floor=1e-3)


def test_a_case_that_is_not_understood_fails() -> None:
    about = {"level": "op", "hyperparameters": {}}
    with pytest.raises(pytest.fail.Exception, match="not understood"):
        run(Case("autocompressor", "strange", about, {"out.x": torch.ones(1)}))
