"""Block memory of InfLLM: who is a representative, what a unit is worth, which are selected.

Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context
Memory" (2024), section 3. Shapes: B batch, H query heads, Hkv key-value heads (query head h uses
`h // (H / Hkv)`), T tokens, S selections, N units of a block of b tokens, D channels of a head.
Nothing here has a gradient: what is selected is a choice.
"""

from __future__ import annotations

from memwrap.ops.infllm.op import (
    Selection,
    gather_queries,
    received_products,
    representatives,
    select,
    settled,
    unit_scores,
)

__all__ = [
    "Selection", "gather_queries", "received_products", "representatives", "select", "settled",
    "unit_scores",
]  # fmt: skip
