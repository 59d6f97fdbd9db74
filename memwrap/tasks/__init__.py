"""Tasks made offline: seeded, of any length, for any tokenizer, with the places of their facts.

`available()` names them, `task(name)` makes one. Each gives `Sample`s; `memwrap.evaluation.suite`
scores them beside the controls, and their `training_row` is what a model is trained on.
"""

from memwrap.tasks import facts, lists, niah, passkey, symbols, told  # noqa: F401
from memwrap.tasks.base import Sample, Task, available, task

__all__ = ["Sample", "Task", "available", "task"]
