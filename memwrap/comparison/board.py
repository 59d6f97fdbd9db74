"""Memories on a pretrained model that is trained no further, at equal bytes of state.

Every memory reads the same texts and is asked for the facts in them, at sizes that fill each of a
few budgets; beside it stands the base with all of the text, with what the budget holds of it, and
with nothing. Each cell is a file, so that a run that was stopped goes on; `board_page` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import memwrap
from memwrap.assets import FETCHED, ROOT, asset
from memwrap.assets.fetching import fetch
from memwrap.assets.places import find_model
from memwrap.comparison.board_readers import (
    TextRead,
    bytes_of_token,
    decoding_seconds,
    knows,
    read_with_base,
    read_with_memory,
)
from memwrap.comparison.board_sizes import scale_of
from memwrap.comparison.board_texts import exams
from memwrap.evaluation.measure import machine
from memwrap.io.atomic_files import write_text
from memwrap.io.reading import read_json
from memwrap.io.yaml_files import read_yaml
from memwrap.memories.registry import memory_class

FORMAT, VERSION = "memwrap-leaderboard", 1
PLAN = ROOT / "leaderboard.yaml"
HEAD = "board.json"
WHOLE, TRUNCATED, NOTHING = "base, whole text", "base, truncated", "base, no text"
FREE, SHIPPED, UNTRAINED, LISTED = "training-free", "shipped", "untrained", "listed"
"""Kinds of cells: it needs no training; a trained memory is shipped; it needs training and is
neutral without; it is named alone."""
MEGABYTE = 1_000_000
QUESTION = 128
"""Tokens that are left for a question, where a text is longer than the base's context."""
Cell = dict[str, Any]


def load_board_plan(path: str | Path | None = None, **changes: Any) -> dict[str, Any]:
    """Read what a leaderboard measures (default: the shipped plan).

    Args:
        path: of a YAML file.
        changes: values that stand in place of the file's; None changes nothing.

    Raises:
        ValueError: for a file that is no such plan, or an unknown memory in it.
    """
    needed = read_yaml(PLAN).keys()
    values = read_yaml(Path(path or PLAN))
    if not isinstance(values, dict) or values.keys() != needed:
        raise ValueError(f"{path} is no plan of a leaderboard; it needs {sorted(needed)}.")
    values |= {name: value for name, value in changes.items() if value is not None}
    for name in values["memories"]:
        memwrap.config_class(name)
    return values


class Board:
    """A leaderboard in a folder: its cells, and the model that fills them.

    Args:
        model: of the base: a folder, a name such as `"smollm2"`, or a repo.
        folder: for results; goes on with what is there.
        values: of `load_board_plan`; None for the shipped plan.

    Raises:
        ValueError: for a folder with results of another model or plan.
    """

    def __init__(
        self, model: str, folder: str | Path, values: dict[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.values = values or load_board_plan()
        asked = {"model": model, "values": self.values}
        self.head = _head(self.folder / HEAD, asked)
        place = fetch(model) if model in FETCHED else find_model(model)
        self.base: Any = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(place)
        names = ("texts", "tokens", "facts", "seed", "documents")
        self.exams = exams(self.tokenizer, **{name: self.values[name] for name in names})
        self.token_bytes = bytes_of_token(self.base, self.exams[0].ids)

    def run(self, names: list[str] | None = None, progress: bool = True) -> list[Cell]:
        """Fill the cells of the base and of memories (default: all); returns all that are there."""
        wanted = [*self._base_cells(), *self._planned(names or memwrap.available(), progress)]
        with tqdm(total=len(wanted) * len(self.exams), disable=not progress) as bar:
            for index in range(len(self.exams)):  # a run that is stopped has something of all
                for cell in wanted:
                    bar.set_description(key_of(cell))
                    self.fill(cell, index)
                    bar.update(1)
        return read_cells(self.folder)

    def fill(self, cell: Cell, index: int) -> None:
        """Measure a cell on the text of that number, unless its file has that."""
        path = self.folder / f"{key_of(cell)}.json"
        about = {"format": FORMAT, "version": VERSION, **cell, "machine": machine(), "texts": []}
        known = read_json(path) if path.exists() else about
        if len(known["texts"]) <= index and (cell["kind"] != LISTED or not path.exists()):
            if cell["kind"] != LISTED:
                known["texts"].append(self._measured(cell, index))
            write_text(path, json.dumps(known, indent=1) + "\n")

    def _base_cells(self) -> list[Cell]:
        plain = [{"name": name, "budget": None, "kind": FREE} for name in (WHOLE, NOTHING)]
        cut = [{"name": TRUNCATED, "budget": b, "kind": FREE} for b in self.values["budgets"]]
        return [{**cell, "window": self.window_of(cell)} for cell in (*plain, *cut)]

    def _planned(self, names: list[str], progress: bool) -> list[Cell]:
        """Find the cells of each memory, those that are known from the folder."""
        known = self.head["cells"]
        self.head["names"] = sorted({*self.head.get("names", ()), *names})
        for name in tqdm(names, desc="sizes", disable=not progress):
            if name not in known:
                known[name] = self._cells_of(name)
                write_text(self.folder / HEAD, json.dumps(self.head, indent=1) + "\n")
        cells = [cell for name in names for cell in known[name]]
        order = (FREE, SHIPPED, LISTED, UNTRAINED)
        return sorted(cells, key=lambda cell: order.index(cell["kind"]))

    def _cells_of(self, name: str) -> list[Cell]:
        entry = self.values["memories"].get(name) or {}
        settings = {"segment_size": self.values["segment_size"], **(entry.get("settings") or {})}
        cell = {"name": name, "budget": None, "settings": settings, "kind": FREE}
        cell |= {"asking": entry.get("asking") or {}}
        adapter = entry.get("adapter")
        if adapter and self._takes({**cell, "adapter": adapter}):
            return [{**cell, "kind": SHIPPED, "adapter": adapter}]
        refusal, trains = "", False
        try:
            with self._model(cell) as model:
                trains = any(True for _ in model.memory_parameters())
        except ValueError as error:
            refusal = " ".join(str(error).split())
        claims = memory_class(name).claims
        if refusal or claims.linearizes or (trains and not claims.neutral_start):
            note = refusal or "needs training, and without it changes what the base says"
            return [{**cell, "kind": LISTED, "note": note}]
        if trains:
            return [{**cell, "kind": UNTRAINED}]
        return self._sized(cell)

    def _sized(self, cell: Cell) -> list[Cell]:
        """Make a cell for each budget; one where the sizes do not matter, and none twice."""
        scale = scale_of(self.base, cell["name"], cell["settings"], self.exams[0].ids)
        if scale is None:
            return [cell]
        cells: list[Cell] = []
        for budget in self.values["budgets"]:
            sizes = scale.settings(budget * MEGABYTE)
            if sizes is None or any(sizes.items() <= c["settings"].items() for c in cells):
                continue
            cells.append({**cell, "budget": budget, "settings": {**cell["settings"], **sizes}})
        return cells or [{**cell, "kind": LISTED, "note": "does not fit the budgets"}]

    def _takes(self, cell: Cell) -> bool:
        """Tell whether a shipped memory is of this base."""
        try:
            with self._model(cell):
                return True
        except ValueError:
            return False

    @contextmanager
    def _model(self, cell: Cell) -> Iterator[Any]:
        """Put a cell's memory on the base."""
        torch.manual_seed(self.values["seed"])
        if "adapter" in cell:
            place: Any = asset(cell["adapter"]) or cell["adapter"]
            model = memwrap.load(place, self.base).eval()
        else:
            model = memwrap.wrap(self.base, cell["name"], **cell["settings"]).eval()
        try:
            yield model
        finally:
            memwrap.unwrap(model)

    def _measured(self, cell: Cell, index: int) -> dict[str, Any]:
        """Let a cell's reader read a text, and ask it."""
        if cell["name"] not in (WHOLE, TRUNCATED, NOTHING):
            with self._model(cell) as model:
                read = partial(read_with_memory, model)
                return self._asked(read, index, lambda: asking(model, cell))
        read = partial(
            read_with_base, self.base, window=self.window_of(cell), token_bytes=self.token_bytes
        )
        return self._asked(read, index, nullcontext)

    def window_of(self, cell: Cell) -> int:
        """Count the tokens at once that the base is given in a cell."""
        if cell["name"] == NOTHING:
            return 0
        config = self.base.config.get_text_config()
        context = max(1, getattr(config, "max_position_embeddings", 2**40) - QUESTION)
        most = min(max(len(exam.ids) for exam in self.exams), context)
        room = most if cell["budget"] is None else cell["budget"] * MEGABYTE / self.token_bytes
        return max(1, min(int(room), most))

    def _asked(
        self, read: Callable[[list[int]], TextRead], index: int,
        asked_with: Callable[[], AbstractContextManager[Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """Ask a text's facts of what was read of it, and of another text (`shuffled`)."""
        exam, device = self.exams[index], self.base.device
        text = read(exam.ids)
        with asked_with():
            values = {
                "tokens": len(exam.ids), "bytes": text.bytes, "reading_seconds": text.seconds,
                "nats": [round(value, 4) for value in text.nats],
                "hits": [knows(text, asked, device) for asked in exam.asked],
                "decoding_seconds": decoding_seconds(text, exam.asked[0], device),
            }  # fmt: skip
        if self.values["shuffled"] and len(self.exams) > 1:
            other = read(self.exams[index - 1].ids)
            with asked_with():
                values["shuffled"] = [knows(other, asked, device) for asked in exam.asked]
        return values


@contextmanager
def asking(model: Any, cell: Cell) -> Iterator[None]:
    """Give a memory the settings of a cell that hold while it is asked."""
    if not cell.get("asking"):
        yield
        return
    before = model.memory_settings(cell["name"], **cell["asking"])
    try:
        yield
    finally:
        model.memory_settings(cell["name"], **before)


def key_of(cell: Cell) -> str:
    """Name a cell, and its file."""
    name = cell["name"].replace(", ", "_").replace(" ", "_")
    return name if cell["budget"] is None else f"{name}-{cell['budget']:g}MB"


def _head(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Read what a folder's results are of, or begin it.

    Raises:
        ValueError: if it is something else than what is asked for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return {"format": FORMAT, "version": VERSION, **asked, "cells": {}}
    head = read_json(path)
    for name, value in asked.items():
        if head.get(name) != json.loads(json.dumps(value)):
            raise ValueError(f"{path} is of another {name}; take another folder, or the same plan.")
    return head


def read_cells(folder: str | Path) -> list[Cell]:
    """Read the cells in a folder, those of the base first.

    Raises:
        ValueError: for a file that is none.
    """
    cells = []
    for path in sorted(Path(folder).glob("*.json")):
        values = read_json(path)
        about = values if isinstance(values, dict) else {}
        if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} is no result of a leaderboard (version {VERSION}).")
        if path.name != HEAD:
            cells.append(values)
    order = {NOTHING: -3, TRUNCATED: -2, WHOLE: -1}
    return sorted(cells, key=lambda c: (order.get(c["name"], 0), c["name"], c["budget"] or 0))


__all__ = ["Board", "key_of", "load_board_plan", "read_cells"]
