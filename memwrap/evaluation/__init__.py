"""Tasks, perplexity by position, controls, tables and plots."""

from memwrap.evaluation.associative import (
    AssociativeDataset,
    AssociativeTask,
    RecallResult,
    evaluate_recall,
)
from memwrap.evaluation.needles import NeedleSample, NeedleTask
from memwrap.evaluation.perplexity import (
    Curve,
    PerplexityResult,
    lora_disabled,
    perplexity_by_position,
)
from memwrap.evaluation.plots import plot_needles, plot_perplexity, plot_recall
from memwrap.evaluation.retrieval import NeedleResult, evaluate_needles

__all__ = [
    "AssociativeDataset",
    "AssociativeTask",
    "Curve",
    "NeedleResult",
    "NeedleSample",
    "NeedleTask",
    "PerplexityResult",
    "RecallResult",
    "evaluate_needles",
    "evaluate_recall",
    "lora_disabled",
    "perplexity_by_position",
    "plot_needles",
    "plot_perplexity",
    "plot_recall",
]
