"""Tasks, perplexity by position, controls, tables and plots."""

from memwrap.evaluation.associative import (
    AssociativeDataset,
    AssociativeTask,
    RecallResult,
    evaluate_recall,
)
from memwrap.evaluation.perplexity import (
    Curve,
    PerplexityResult,
    lora_disabled,
    perplexity_by_position,
)
from memwrap.evaluation.plots import plot_perplexity, plot_recall

__all__ = [
    "AssociativeDataset",
    "AssociativeTask",
    "Curve",
    "PerplexityResult",
    "RecallResult",
    "evaluate_recall",
    "lora_disabled",
    "perplexity_by_position",
    "plot_perplexity",
    "plot_recall",
]
