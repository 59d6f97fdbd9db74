"""Tasks, perplexity by position, controls, tables and plots."""

from memwrap.backbones.adapters import lora_disabled
from memwrap.evaluation.perplexity import Curve, PerplexityResult, perplexity_by_position
from memwrap.evaluation.plots import plot_perplexity, plot_recall
from memwrap.evaluation.recall import RecallResult, evaluate_recall
from memwrap.evaluation.suite import Cell, SuiteResult, evaluate_tasks
from memwrap.tasks.associative import AssociativeDataset, AssociativeTask

__all__ = [
    "AssociativeDataset",
    "AssociativeTask",
    "Cell",
    "Curve",
    "PerplexityResult",
    "RecallResult",
    "SuiteResult",
    "evaluate_recall",
    "evaluate_tasks",
    "lora_disabled",
    "perplexity_by_position",
    "plot_perplexity",
    "plot_recall",
]
