"""Recipes: one YAML file that says what to train, checked whole before anything is loaded."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterator
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import memwrap
from memwrap.io.yaml_files import read_yaml_text
from memwrap.memories.config import MemoryConfig
from memwrap.memories.registry import config_class
from memwrap.memories.settings import Kind
from memwrap.stores.urls import without_secrets
from memwrap.training.pretrain import PretrainConfig
from memwrap.training.schema_check import build, check
from memwrap.training.sections import (
    DataSection,
    LayerChoiceSection,
    LoraSection,
    ModelSection,
    RecallSection,
    Section,
    StartSection,
    TasksSection,
    TrainerSection,
    expanded,
)

Folder = Annotated[str, Kind("text that names a folder, as in output=runs/first", bool)]


class Recipe(Section):
    """The description of a run. Made by `load_recipe`.

    Attributes:
        task: `finetune` (documents), `recall` (associative recall), `tasks` (tasks of the
            evaluation suite) or `pretrain` (a small LM from scratch).
        output: folder for everything the run writes.
        model, memory, lora, data, recall, tasks, start, pretrain, trainer: see the sections;
            `memory` holds a memory's `name` and the fields of its config.
        train_backbone: train the backbone's own weights too (without LoRA).
        stages: runs that follow each other, by name: each the recipe with these sections laid over
            it, from the weights of the one before, in `OUTPUT/stages/NAME`. The last one's model
            is `output`'s.
        layer_choice: which layers keep their softmax, measured behind the first stage with
            `trainer.mixer_matching` (else before the first stage).
        init_from: output folder of an earlier run with the same kind of memory, whose weights
            this run starts from: a stage of training hands over to the next.
        resume: continue from the last checkpoint in `output`.
        overwrite: write into `output` although it holds files.
    """

    task: Literal["finetune", "pretrain", "recall", "tasks"] = "finetune"
    output: Folder = ""
    model: ModelSection = field(default_factory=ModelSection)
    memory: dict[str, Any] | None = None
    lora: LoraSection | None = None
    train_backbone: bool = False
    init_from: Folder | None = None
    stages: dict[str, Any] | None = None
    layer_choice: LayerChoiceSection | None = None
    data: DataSection | None = None
    recall: RecallSection | None = None
    tasks: TasksSection | None = None
    start: StartSection = field(default_factory=StartSection)
    pretrain: PretrainConfig | None = None
    trainer: TrainerSection = field(default_factory=TrainerSection)
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.runs: list[Recipe] = []
        self.source = ""
        self.verb, self.options = "train", list[str]()
        self.overrides: list[str] = []
        self.output = expanded(self.output)
        self.init_from = self.init_from and expanded(self.init_from)
        if self.task == "pretrain":
            self.pretrain = self.pretrain or PretrainConfig()
            self.pretrain.output = self.output
            return
        if self.memory is None or "name" not in self.memory:
            known = ", ".join(memwrap.available())
            raise ValueError(f"`memory.name` is missing; give one of {known}.")
        config = self.memory_config()
        if self.lora is not None and self.train_backbone:
            raise ValueError("`train_backbone` does not go with `lora`; set lora=null or drop it.")
        if self.task == "recall":
            self.recall = self.recall or RecallSection()
            size = self.recall.segment_size
            if config.segment_size != size:
                raise ValueError(
                    f"`memory.segment_size` is {config.segment_size}; it must be {size} here: key "
                    f"({self.recall.key_size}) + value ({self.recall.value_size}) + 2."
                )
        else:
            if self.task == "tasks":
                self.tasks = self.tasks or TasksSection()
            else:
                self.data = self.data or DataSection()
            if self.model.scratch is not None:
                raise ValueError("`model.scratch` has no tokenizer for documents; give model.name.")

    def validate_stages(self) -> None:
        names, parts = list(self.stages or {}), list((self.stages or {}).values())
        if self.stages is not None and not (
            names
            and all(re.fullmatch(r"\w[\w-]*", str(name)) for name in names)
            and all(isinstance(part, dict) and part.keys() <= _OF_A_STAGE for part in parts)
        ):
            allowed = f"names, each with sections among {', '.join(sorted(_OF_A_STAGE))}"
            self.refuse("stages", allowed)

    def validate_layer_choice(self) -> None:
        if self.layer_choice is not None and self.stages is None:
            self.refuse("layer_choice", "null without stages")

    def memory_config(self) -> MemoryConfig:
        """Return the memory's config.

        Raises:
            ValueError: for an unknown memory, field or value.
        """
        return config_class((self.memory or {})["name"]).from_dict(self.memory or {})

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe, without what its task has no use for, what concerns one run
        only, and credentials."""
        values = asdict(self)
        for name in _CREDENTIALS if self.data else ():
            values["data"]["options"].pop(name, None)
        if self.memory is not None:
            values["memory"] = self.memory_config().to_dict()
        return {k: v for k, v in values.items() if k not in _foreign(self.task) | _RUN}

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML: `load_recipe` reads it again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @property
    def command(self) -> list[str]:
        """The command that runs this recipe again, without passwords and tokens: it is written
        down."""
        source = [self.source] if self.source else self.options
        return ["memwrap", self.verb, *source, *map(without_secrets, self.overrides)]


_OF_A_STAGE = {"memory", "lora", "train_backbone", "data", "trainer"}
_SECTIONS = {
    "finetune": (
        "model",
        "memory",
        "lora",
        "train_backbone",
        "init_from",
        "stages",
        "layer_choice",
        "data",
        "trainer",
    ),
    "recall": ("model", "memory", "lora", "train_backbone", "init_from", "recall", "trainer"),
    "tasks": (
        "model",
        "memory",
        "lora",
        "train_backbone",
        "init_from",
        "tasks",
        "start",
        "trainer",
    ),
    "pretrain": ("pretrain",),
}


_RUN = {"resume", "overwrite"}
_CREDENTIALS = ("token", "use_auth_token", "storage_options")  # of `datasets.load_dataset`


def _foreign(task: str) -> set[str]:
    """List keys that a task has no use for."""
    every = {name for names in _SECTIONS.values() for name in names}
    return every - set(_SECTIONS[task])


def recipe_folders() -> list[Path]:
    """List the folders in which recipes are looked for by name: `./recipes`, then those that came
    with memwrap."""
    package = Path(memwrap.__file__).parent
    return [Path("recipes"), package / "recipes", package.parent / "recipes"]


def find_recipe(path_or_name: str | Path) -> Path:
    """Find the file of a recipe given by path or by name.

    Raises:
        ValueError: if there is none; suggests the nearest name.
    """
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    name = path.name.removesuffix(".yaml")
    if len(path.parts) == 1 or path.parts[0] == "recipes":
        for folder in recipe_folders():
            if (folder / f"{name}.yaml").is_file():
                return folder / f"{name}.yaml"
    names = sorted({file.stem for folder in recipe_folders() for file in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"There is no recipe {str(path_or_name)!r}. {hint}Give a YAML file or one of: "
        f"{', '.join(names) or '(none found)'}."
    )


def load_recipe(path_or_name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and check all of it.

    Args:
        path_or_name: a YAML file, or the name of a recipe in `./recipes` or in memwrap's own.
        overrides: `key.inner=value` entries that change it.

    Raises:
        ValueError: for a missing or unreadable file, an unknown key (names the file and the
            nearest key), a wrong type or value.
    """
    path = find_recipe(path_or_name)
    recipe = resolve(_read(path), path, overrides)
    recipe.source = str(path_or_name)
    return recipe


def resolve(file: dict[str, Any], path: Path, overrides: list[str] | None = None) -> Recipe:
    """Check the values of a recipe, and make it.

    Args:
        file: the values.
        path: where they stand, for errors.
        overrides: as for `load_recipe`.

    Raises:
        ValueError: as `load_recipe`.
    """
    _check_all(file, str(path))
    changes = _dotlist(overrides or [])
    _check_all(changes, "the command line", _memory_name(file))
    try:
        merged = OmegaConf.merge(file, changes)
        values: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: `{error.full_key}`: {reason}.") from error
    _check_all(values, str(path))
    _check_server(values, changes, path)
    task = values.get("task", "finetune")
    for key in values:
        if key in _foreign(task) and values[key] is not None:
            raise ValueError(f"{path}: `{key}` has no use in a {task!r} recipe; take it out.")
    try:
        recipe = build(Recipe, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    recipe.overrides = list(overrides or [])
    recipe.runs = _runs(values, path)
    return recipe


def _runs(values: dict[str, Any], path: Path) -> list[Recipe]:
    """Make the recipes of the stages."""
    shared = {k: v for k, v in values.items() if k not in ("stages", "layer_choice", *_RUN)}
    runs: list[Recipe] = []
    for name, part in (values.get("stages") or {}).items():
        output = str(Path(values.get("output") or "") / "stages" / name)
        before = runs[-1].output if runs else values.get("init_from")
        laid: Any = OmegaConf.to_container(OmegaConf.merge(shared, part))
        laid |= {"output": output, "init_from": before}
        runs.append(resolve(laid, Path(f"{path}: stage {name!r}")))
    return runs


def _read(path: Path) -> dict[str, Any]:
    text = read_yaml_text(path)
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text else None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of keys.")
    _check_references(values, path)
    return typing.cast(dict[str, Any], values)


# A reference of a file: to another of its values, and no call.
_REFERENCE = re.compile(r"\$\{\s*([\w.-]+)\s*\}")
_MOST_REFERENCES = 100


def _check_references(values: Any, path: Path) -> None:
    """Refuse what reads more than the recipe itself: who runs a recipe need not have written it,
    and what it resolves to is written into the run's files. Overrides may use all of OmegaConf."""
    count = 0
    for text in _texts(values):
        references = _REFERENCE.findall(text)
        count += text.count("${")
        if len(references) != text.count("${") or count > _MOST_REFERENCES:
            raise ValueError(
                f"{path}: {text[:60]!r}: a recipe may refer to its own keys, such as "
                "${trainer.steps}, and to nothing else; give that on the command line."
            )
        for key in references:
            target: Any = values
            for name in key.split("."):
                target = target.get(name) if isinstance(target, dict) else None
            if any("${" in other for other in _texts(target)):
                raise ValueError(f"{path}: {text[:60]!r} refers to a value that refers on.")


def _check_server(values: dict[str, Any], changes: dict[str, Any], path: Path) -> None:
    """Refuse a server, or a tracker, that stands in the file: it would be sent this machine's
    credentials, or text of it."""
    for key, text in _leaves(values):
        named: Any = changes
        for name in key.split("."):
            named = named.get(name) if isinstance(named, dict) else named
        if "://" in text and named is None and key != "data.template":
            raise ValueError(
                f"{path}: `{key}` is a server; memwrap connects to none that a file names. Give "
                f"it on the command line: {key}=URL."
            )
    trackers, asked = ((v.get("trainer") or {}).get("report_to") for v in (values, changes))
    if trackers not in (None, "none", "tensorboard") and asked is None:
        raise ValueError(
            f"{path}: `trainer.report_to` sends the run elsewhere, which no file may decide. Give "
            f"it on the command line: trainer.report_to={trackers}."
        )


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Collect the strings in a value, each with its dotted key."""
    if isinstance(node, str):
        yield key, node
    parts = node.items() if isinstance(node, dict) else ()
    for name, part in enumerate(node) if isinstance(node, list) else parts:
        yield from _leaves(part, f"{key}.{name}" if key else str(name))


def _texts(node: Any) -> Iterator[str]:
    """Collect all strings in a value, names of keys too."""
    if isinstance(node, str):
        yield node
    parts = [x for pair in node.items() for x in pair] if isinstance(node, dict) else node
    for part in parts if isinstance(parts, list) else ():
        yield from _texts(part)


def _dotlist(overrides: list[str]) -> dict[str, Any]:
    for entry in overrides:
        key, separator, _ = entry.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"{entry!r} is no override; it must be KEY=VALUE.")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist(overrides), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"An override cannot be read: {str(error).splitlines()[0]}") from error
    return typing.cast(dict[str, Any], values)


def _check_all(values: dict[str, Any], where: str, memory: str | None = None) -> None:
    """Refuse unknown keys and wrong types in a recipe or a part of one.

    Args:
        values: the recipe's keys.
        where: what errors name: the file, or the command line.
        memory: name of the memory, where `values` does not say.
    """
    check(Recipe, values, where)
    fields_ = values.get("memory")
    if not isinstance(fields_, dict):
        return
    name = fields_.get("name", memory)
    if not isinstance(name, str):
        raise ValueError(
            f"{where}: `memory.name` is {name!r}; give one of {', '.join(memwrap.available())}."
        )
    try:
        config = config_class(name)
    except ValueError as error:
        raise ValueError(f"{where}: `memory.name`: {error}") from error
    rest = {k: v for k, v in fields_.items() if k != "name"}
    check(config, rest, f"{where} (memory {name})", "memory.")


def _memory_name(values: dict[str, Any]) -> str | None:
    memory = values.get("memory")
    return memory.get("name") if isinstance(memory, dict) else None


__all__ = ["Recipe", "find_recipe", "load_recipe", "recipe_folders", "resolve"]
