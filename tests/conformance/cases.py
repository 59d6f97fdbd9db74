"""Reference vectors: where they are, what a case says, and how results are compared with it.

Nothing that a case says is passed over: its settings and tensors remember which of them a run has
used, and `compare` fails on any that is left. So a runner needs no list of names, and a case with a
setting that its runner does not know fails with that setting's name.

A case is run in float64 and in float32. What is met in float64 is a matter of the reference alone:
nothing, where it was computed in float64 too, and its rounding where it was float32, a number that
no processor changes. Float32 adds our own rounding, which another order of sums changes; the
tolerances are those that `docs/testing.md` argues for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from memwrap.testing.margins import record

VARIABLE = "MEMWRAP_CONFORMANCE_DIR"
FOLDERS = tuple(Path(f) for f in os.environ.get(VARIABLE, "").split(os.pathsep) if f)
OWN = Path(__file__).parent / "data"
# Methods with vectors that memwrap does not have yet: the one place that says so. A folder that is
# neither here nor read by a runner is an error (test_cases.py), and so is a name here that is.
NOT_BUILT = frozenset({
    "memory_decoder", "memoryllm", "sentinel",
})  # fmt: skip
PRECISIONS = (torch.float64, torch.float32)
both_precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])
# Results, whatever a runner reads of them; other tensors are inputs once they are read.
RESULTS = ("out.", "grad.", "grad_", "gen.")
Got = dict[str, Tensor | Sequence[Tensor]]


class Entries(dict[str, Any]):
    """What a case holds by name; it remembers what was asked for."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__({n: Entries(x) if isinstance(x, dict) else x for n, x in entries.items()})
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)

    def peek(self, name: str) -> Any:
        """The entry, without using it."""
        return super().__getitem__(name)

    def left(self, prefix: str = "") -> list[str]:
        """Names that nobody asked for, nested ones with a dot."""
        found = [prefix + n for n in sorted(self.keys() - self.used)]
        for name, entry in self.items():
            if name in self.used and isinstance(entry, Entries):
                found += entry.left(f"{prefix}{name}.")
        return found


@dataclass
class Case:
    """One case: its description, its tensors in the precision that it is run in.

    Attributes:
        about: the whole description.
        settings: its hyperparameters.
        stored: whether the reference was computed in float64.
    """

    method: str
    name: str
    about: dict[str, Any]
    settings: Entries
    tensors: Entries
    dtype: torch.dtype
    exact: bool

    @property
    def level(self) -> str:
        return self.about["level"]

    @property
    def says(self) -> str:
        """The description in words."""
        return self.about["semantics"]

    def holds(self, **facts: Any) -> None:
        """Check settings that repeat what the tensors or other settings say."""
        for name, fact in facts.items():
            if name in self.settings:
                said = self.settings[name]
                assert said == fact, f"{self.name}: {name} is {said!r}, understood is {fact!r}"

    def among(self, name: str, choices: Mapping[Any, Any], default: Any = None) -> Any:
        """What a setting's value stands for."""
        value = self.settings.get(name, default)
        assert value in choices, f"{self.name}: {name} is {value!r}, understood are {[*choices]}"
        return choices[value]

    def aside(self, *names: str) -> None:
        """Settings that say how the case was made and not what is computed."""
        for name in names:
            entry = self.settings.get(name)
            if isinstance(entry, Entries):
                entry.used |= entry.keys()

    def given(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def want(self, name: str) -> Tensor:
        """A result of the reference, to be compared all the same."""
        return self.tensors.peek(name)

    def starting(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names start so, without the prefix."""
        names = [n for n in self.tensors if n.startswith(prefix)]
        return {n.removeprefix(prefix): self.tensors[n] for n in names}

    def leaves(self, *names: str) -> dict[str, Tensor]:
        """Copies of inputs that take gradients; those that the case does not have are left out."""
        there = [n for n in names if n in self.tensors]
        return {n: self.tensors[n].clone().requires_grad_() for n in there}

    def not_understood(self) -> NoReturn:
        pytest.fail(f"{self.name}: not understood; it holds {sorted(self.tensors)}")


@dataclass(frozen=True)
class Tolerances:
    """What may differ, in units of the reference tensor's largest value, by the beginning of its
    name (the longest that fits counts).

    Attributes:
        reference: float64 against a reference in float32: its own rounding.
        float32: float32 against either: that, and another order of sums.
        exact: float64 against a reference in float64.
        floor: a gradient's unit is at least this part of the largest gradient's (some are zero but
            for rounding: that of a key's bias, which moves all scores alike).
    """

    reference: dict[str, float]
    float32: dict[str, float]
    exact: dict[str, float] = field(default_factory=lambda: {"": 1e-12})
    floor: float = 0.0

    def of(self, case: Case) -> dict[str, float]:
        if case.dtype == torch.float32:
            return self.float32
        return self.exact if case.exact else self.reference


def paths_of(method: str) -> dict[str, Path]:
    """Every case of a method: from the folders that are given, or, where none of them has the
    method, from the tests' own selection."""
    for folders in (FOLDERS, (OWN,)):
        found: dict[str, Path] = {}
        for folder in folders:
            files = (folder / method).glob("*")
            kinds = {f.with_suffix("") for f in files if f.suffix in (".json", ".safetensors")}
            for path in sorted(kinds):
                name = path.name if path.name not in found else f"{path.name} ({folder.name})"
                found[name] = path
        if found:
            return found
    return {}


def names_of(method: str) -> list[str]:
    """Names of all cases. None at all is an error, not an empty test."""
    return list(paths_of(method)) or ["no case found"]


def read_case(method: str, name: str, dtype: torch.dtype = torch.float32) -> Case:
    """Read a case, to be run in `dtype`."""
    path = paths_of(method)[name]
    assert path.with_suffix(".json").is_file(), f"{path}.json is missing"
    assert path.with_suffix(".safetensors").is_file(), f"{path}.safetensors is missing"
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert about["method"] == method and about["case"] == path.name
    tensors = load_file(path.with_suffix(".safetensors"))
    for key, entry in about["tensors"].items():
        assert list(tensors[key].shape) == entry["shape"], key
    assert tensors.keys() == about["tensors"].keys(), "tensors and their description disagree"
    wide = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    exact = about["dtype"] == "float64"
    return Case(method, name, about, Entries(about["hyperparameters"]), Entries(wide), dtype, exact)


def gradients_of(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by the reference's names; zeros for what the loss did not reach."""
    return {
        f"grad.{n}": torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()
    }


def compare(case: Case, got: Got, tolerances: Tolerances) -> None:
    """Check that every setting was used, and every tensor used or reproduced.

    Args:
        got: results by the reference tensor's name, one or several that must all agree. Those that
            the case does not hold are left out.
    """
    assert not case.settings.left(), (
        f"{case.name}: settings {case.settings.left()} are not understood"
    )
    there = {n for n in case.tensors if not n.startswith("base.")}
    results = {n for n in there if n.startswith(RESULTS)}
    missing = sorted((there - case.tensors.used - got.keys()) | (results - got.keys()))
    assert not missing, f"{case.name}: tensors {missing} were neither used nor compared"
    limits = tolerances.of(case)
    got = {n: x for n, x in got.items() if n in there}
    gradients = [case.want(n) for n in got if n.startswith("grad")]
    least = tolerances.floor * max((float(g.abs().max()) for g in gradients), default=0.0)
    wrong = []
    for name in sorted(got):
        want, found = case.want(name), got[name]
        for value in [found] if isinstance(found, Tensor) else found:
            if not want.is_floating_point():
                if not torch.equal(value.to(want.dtype).view_as(want), want):
                    wrong.append(f"{name}: {value.tolist()} instead of {want.tolist()}")
                continue
            allowed = limits[max((p for p in limits if name.startswith(p)), key=len)]
            error = error_of(value, want, least if name.startswith("grad") else 0.0)
            record(error, allowed, name)
            if not error <= allowed:
                wrong.append(f"{name}: {error:.2e} > {allowed:.0e}")
    assert not wrong, f"{case.name}: " + "; ".join(wrong)


def error_of(value: Tensor, want: Tensor, least: float = 0.0) -> float:
    """The largest difference, in units of the largest wanted value (at least `least`)."""
    if not want.numel():
        return 0.0
    value = value.detach().reshape(want.shape).to(want.dtype)
    scale = max(float(want.abs().max()), least, 1e-12)
    return float((value - want).abs().max()) / scale
