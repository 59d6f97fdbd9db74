"""Conformance of AutoCompressor: every reference case, through the public classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import backbone_of, base_gradients, sizes_of
from cases import Case, Got, Tolerances, both_precisions, compare, gradients_of, names_of, read_case
from models import by_segment

import memwrap

# Met: 9e-6, gradients 2e-5. Those of a key's bias are zero but for 6e-8 of the largest gradient.
TOLERANCES = Tolerances(
    reference={"": 5e-5, "grad.": 1e-4},
    float32={"": 5e-5, "grad.": 1e-4},
    floor=5e-3,
)
BACKBONES = {"hf_llama": False, "flash_llama": False, "opt": True}


def model_of(case: Case, capacity: int) -> Any:
    sizes = sizes_of(case.settings["base"])
    assert case.among("backbone", BACKBONES) == (sizes["rope_theta"] is None)
    config = memwrap.AutoCompressorConfig(
        # No segment fills: each is closed where the case cuts.
        segment_size=max(case.settings["segment_lengths"]) + 1,
        num_memory_tokens=case.settings["summary_length_k"],
        memory_size=capacity,
        accumulate=case.settings["accumulate_summary"],
        length_spread=0.0,
        bptt_segments=None,
    )
    model = memwrap.wrap(backbone_of(case, sizes), config)
    with torch.no_grad():
        model.memories["autocompressor"].tokens.copy_(case.tensors["embed_summary"])
    return model.eval()


def run(case: Case) -> Got:
    if case.level != "model" or "softprompt_out" not in case.tensors:
        case.not_understood()
    ids, own = case.tensors["input_ids"], case.leaves("softprompt_in")
    rows = [case.want(n).shape[1] for n in ("softprompt_in", "softprompt_out") if n in case.tensors]
    model = model_of(case, max(rows) + 3)  # places that stay empty
    memory, state = model.memories["autocompressor"], model.new_state(len(ids))
    if own:
        state.memories["autocompressor"] = memory.prompt(own["softprompt_in"])
    logits, losses = [], []
    for part in ids.chunk(case.settings["training_substeps"], 1):
        pieces, loss, state = by_segment(
            model, part, case.settings["segment_lengths"], state.detach() if losses else state,
            close_last=case.settings["output_softprompt"],
        )  # fmt: skip
        loss.backward()
        logits.append(pieces)
        losses.append(loss)
    results = {
        "logits": torch.cat(logits, 1),
        "loss": torch.stack(losses),
        "softprompt_out": torch.stack(memory.summaries(state)),
        "grad.embed_summary": memory.tokens.grad,
    }
    return results | gradients_of(own) | base_gradients(model, case)


def check(case: Case) -> None:
    compare(case, run(case), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", names_of("autocompressor"))
def test_autocompressor(name: str, dtype: torch.dtype) -> None:
    check(read_case("autocompressor", name, dtype))
