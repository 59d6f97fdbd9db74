"""Recipes: all of a file is checked before anything is loaded, and what runs is what it says."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typed_values
import yaml
from support import save_small_base
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

import memwrap
from memwrap.data.stdlib_corpus import split_of
from memwrap.training.finetune import build_model, preflight, run_recipe
from memwrap.training.recipe import Recipe, find_recipe, load_recipe
from memwrap.training.schema_check import check
from memwrap.training.sections import DataSection, RecallSection, TasksSection, TrainerSection

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REAL = [r for r in RECIPES if re.search(r"^  name: \S+/\S+$", r.read_text(), re.MULTILINE)]
SECTIONS = ("model", "lora", "data", "recall", "tasks", "trainer", "pretrain")
# Any recipe, brought down to a run of seconds.
SMALL = [
    "memory.segment_size=16", "data.max_tokens=64",
    "data.min_tokens=8", "trainer.steps=2", "trainer.log_every=1", "trainer.device=cpu",
    "trainer.accumulation=1", "trainer.save_every=null", "lora.r=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    wanted = {"train": 8, "validation": 2, "test": 2}
    for index in range(200):
        name = f"text{index}.md"
        if wanted[split_of(name)] > 0:
            wanted[split_of(name)] -= 1
            text = " ".join(f"Line {n} of text {index} says {n * index}.\n" for n in range(20))
            (folder / name).write_text(text)
    return folder


def write(folder: Path, **values: Any) -> Path:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


# Files


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_valid_and_explains_itself(path: Path) -> None:
    recipe = load_recipe(path)
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head, "a recipe starts with a comment"
    for needed in ("Needs:", "Run it", "Override"):
        assert needed in head.group()
    for command in re.findall(r"memwrap train (\S+)((?: \S+=\S+)*)", head.group()):
        assert command[0] == path.stem
        load_recipe(path, command[1].split())
    assert Path(recipe.output).name in (path.stem, "tiny-lm")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_resolved_recipe_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again).to_dict() == recipe.to_dict()


def test_names_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe("rmt_lora_tiny").name == "rmt_lora_tiny.yaml"
    assert find_recipe("recipes/rmt_lora_tiny.yaml").name == "rmt_lora_tiny.yaml"
    (tmp_path / "recipes").mkdir()
    own = tmp_path / "recipes" / "rmt_lora_tiny.yaml"
    own.write_text((ROOT / "recipes" / "rmt_lora_tiny.yaml").read_text())
    assert find_recipe("rmt_lora_tiny").resolve() == own
    with pytest.raises(ValueError, match="Did you mean 'rmt_lora_tiny'"):
        find_recipe("rmt_lora_tinny")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.stepps=3", r"the command line: unknown key `trainer.stepps`.*`trainer.steps`"),
        ("steps=3", "did you mean `trainer.steps`"),
        ("memory.segmentsize=3", "did you mean `memory.segment_size`"),
        ("memory.name=armtt", "Did you mean 'armt'"),
        ("trainer.steps=many", "`trainer.steps` is 'many'; it must be an integer of at least 1."),
        ("trainer.steps=true", "`trainer.steps` is True; it must be an integer"),
        ("trainer.steps=2.5", "`trainer.steps` is 2.5; it must be an integer"),
        ("trainer.learning_rate=fast", "it must be a number"),
        ("train_backbone=1", "it must be true or false"),
        ("lora=3", "it must be a mapping of keys or null"),
        ("lora.target_modules=[q_proj,3]", "must be text .not empty. or a list of one or more"),
        ("trainer.segment_curriculum=8", "put it in quotes"),
        ("trainer.steps=0", "the command line: `trainer.steps` is 0; it must be .* at least 1."),
        ("trainer.segment_curriculum='1:8,2:9'", "STEP:NUMBER from step 0 on"),
        ("memory.segment_size=0", "`memory.segment_size` is 0; it must be an integer"),
        ("memory.segment_size=wide", "`memory.segment_size` is 'wide'"),
        ("memory=null", "`memory.name` is missing"),
        ("model.dtype=bf16", "must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("data.max_tokens=100", "at least data.min_tokens"),
        ("task=train", "must be 'finetune', 'pretrain', 'recall' or 'tasks'"),
        ("recall.num_pairs=4", "`recall` has no use in a 'finetune' recipe"),
        ("train_backbone=true", "does not go with `lora`"),
        ("output=''", "`output` is ''"),
        ("trainer.steps", "must be KEY=VALUE"),
        ("trainer=[", "cannot be read"),
        ("data.source=${nothing}", "nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(ROOT / "recipes" / "armt_lora_tiny.yaml", [override])
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("part", SECTIONS)
def test_a_section_takes_what_its_types_hold(part: str) -> None:
    """In a file, where wrong values are named by key, and in Python."""
    section = next(o for o in get_args(Recipe.types()[part]) or [Recipe.types()[part]])
    for name, hint in section.types().items():
        for value in typed_values.inside(hint):
            check(Recipe, {part: {name: value}}, "x.yaml")
        for value in typed_values.outside(hint):
            start = f"`{part}.{name}` is {value!r}; it must be "
            with pytest.raises(ValueError, match=re.escape(f"x.yaml: {start}")):
                check(Recipe, {part: {name: value}}, "x.yaml")
            with pytest.raises(ValueError, match=f"{name}.*{re.escape(repr(value))}; it must be "):
                section(**{name: value})


def test_parts_of_a_section_that_must_go_together() -> None:
    ids = list(range(19))
    for make, wrong, right, message in (
        (DataSection, {"min_tokens": 9, "max_tokens": 8}, {"min_tokens": 8, "max_tokens": 8},
         "`data.max_tokens` is 8; it must be at least data.min_tokens (9), or null."),
        (RecallSection, {"num_pairs": 2, "min_pairs": 3}, {"num_pairs": 3, "min_pairs": 3},
         "`recall.num_pairs` is 2; it must be at least recall.min_pairs (3)."),
        (RecallSection, {"num_pairs": 17}, {"num_pairs": 17, "tasks": ["rewrite"]},
         "`recall.num_pairs` is 17; it must be at most 16, the number of keys."),
        (RecallSection, {"ids": [*ids[1:], 1]}, {"ids": ids},
         f"`recall.ids` is {[*ids[1:], 1]}; it must be 19 different token ids."),
        (RecallSection, {"ids": ids[1:]}, {"ids": ids},
         f"`recall.ids` is {ids[1:]}; it must be 19 different token ids."),
        (TasksSection, {"names": ["passkey", "nope"]}, {"names": ["passkey", "copy"]},
         "`tasks.names` is ['passkey', 'nope']; it must be among babi"),
        (TasksSection, {"min_tokens": 9, "max_tokens": 8}, {"min_tokens": 8, "max_tokens": 8},
         "`tasks.max_tokens` is 8; it must be at least tasks.min_tokens (9)."),
        (TrainerSection, {"label_weight": 0.5}, {"label_weight": 0.5, "distillation_weight": 1},
         "`trainer.label_weight` is 0.5; it must be 1, or with a distillation 0 or more."),
        (TrainerSection, {"vary_segments": True},
         {"vary_segments": True, "segment_curriculum": "0:8"},
         "`trainer.vary_segments` needs `trainer.segment_curriculum`"),
        (TrainerSection, {"segment_curriculum": "0:2,0:4"}, {"segment_curriculum": "0:2,1:4"},
         "`trainer.segment_curriculum` is '0:2,0:4'; it must be text of STEP:NUMBER"),
    ):  # fmt: skip
        make(**right)
        with pytest.raises(ValueError, match=re.escape(message)):
            make(**wrong)


def test_a_mistake_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, output="x", memory={"name": "rmt"}, trainer={"step": 3})
    with pytest.raises(ValueError, match=r"own\.yaml: unknown key `trainer.step`.*trainer.steps"):
        load_recipe(path)
    path.write_text("output: x\nmemory: {name: rmt}\ndata:\n  source: ???")
    with pytest.raises(ValueError, match=r"own\.yaml: .*data\.source"):
        load_recipe(path)
    path.write_text("task: [")
    with pytest.raises(ValueError, match=r"own\.yaml cannot be read as YAML"):
        load_recipe(path)
    path.write_text("- task")
    with pytest.raises(ValueError, match="a recipe is a mapping"):
        load_recipe(path)


def test_overrides_reach_every_depth(tmp_path: Path) -> None:
    path = write(tmp_path, output="x", memory={"name": "rmt"})
    recipe = load_recipe(path, ["lora.r=4", "trainer.learning_rate=1e-3", "data.source=~/text"])
    assert recipe.data is not None and recipe.data.source == str(Path.home() / "text")
    assert recipe.lora is not None and recipe.lora.r == 4
    assert recipe.trainer.learning_rate == 1e-3
    assert load_recipe(path, ["lora=null"]).lora is None
    assert recipe.command == ["memwrap", "train", str(path), *recipe.overrides]


# Runs


def small(recipe: str, base: Path, documents: Path, output: Path, *more: str) -> Recipe:
    own = [f"model.name={base}", f"data.source={documents}", f"output={output}"]
    path = ROOT / "recipes" / f"{recipe}.yaml"
    sizes = ("num_memory_tokens", "memory_size", "compressed_size")
    memory = [f"memory.{n}=2" for n in sizes if f"  {n}:" in path.read_text()]
    return load_recipe(path, [*own, *SMALL, *memory, *more])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r.stem for r in REAL])
def test_a_real_models_recipe_runs(
    recipe: str, base: Path, documents: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    loaded = small(recipe, base, documents, output, "data.eval_split=validation")
    assert run_recipe(loaded) == output
    steps = [row["step"] for row in log_of(output) if "loss" in row]
    assert steps == [1, 2]
    assert [row["step"] for row in log_of(output) if "eval_loss" in row] == [0, 2]
    about = json.loads((output / "run.json").read_text())
    assert about["command"].startswith("memwrap train ") and "trainer.steps=2" in about["command"]
    # Not `torch.__version__`: builds of one version for different GPUs name them there.
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    assert about["steps"] == 2
    assert load_recipe(output / "recipe.yaml").to_dict() == loaded.to_dict()
    model = memwrap.load(output)
    assert model.segment_size == 16 and model.adapters()["default"].r == 2
    before = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = dict(memwrap.unwrap(model).named_parameters())
    for name, value in before.named_parameters():
        same = kept.get(name, kept.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(same, value), f"{name} of a frozen backbone changed"
    AutoTokenizer.from_pretrained(output)


def test_gates_are_logged_and_plotted(base: Path, documents: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    recipe = small("infini_lora", base, documents, output, "trainer.learning_rate=0.0")
    run_recipe(recipe)
    rows = [json.loads(line) for line in (output / "figures.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    gates = [torch.tensor(row["infini.gate"]) for row in rows]
    layers, heads = AutoConfig.from_pretrained(base).num_hidden_layers, 4
    assert gates[0].shape == (layers, heads)
    # The gates' own rate moves them though everything else stands still.
    assert float((gates[1] - gates[0]).abs().max()) > 0
    assert (output / "figures.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [r.stem for r in RECIPES if "recall" in r.stem])
def test_a_recall_recipe_runs(recipe: str, tmp_path: Path) -> None:
    small = ["trainer.steps=2", "trainer.batch_size=2", "trainer.log_every=1", "recall.num_pairs=3"]
    output = tmp_path / "run"
    loaded = load_recipe(
        ROOT / "recipes" / f"{recipe}.yaml", [*small, "trainer.device=cpu", f"output={output}"]
    )
    run_recipe(loaded)
    assert [row["step"] for row in log_of(output)] == [1, 2]
    assert loaded.recall is not None
    assert memwrap.load(output).segment_size == loaded.recall.segment_size
    with pytest.raises(ValueError, match="segment_size"):
        load_recipe(ROOT / "recipes" / f"{recipe}.yaml", ["recall.value_size=3"])


def test_training_changes_what_it_should(base: Path, documents: Path, tmp_path: Path) -> None:
    """Without LoRA the memory alone learns, or with `train_backbone` all of it."""
    for name, override in (("memory", "false"), ("all", "true")):
        more = ["lora=null", f"train_backbone={override}", "model.dtype=auto"]
        own = [entry for entry in SMALL if not entry.startswith("lora")]
        recipe = load_recipe(
            ROOT / "recipes" / "rmt_lora_tiny.yaml",
            [f"model.name={base}", f"data.source={documents}", f"output={tmp_path / name}", *own,
             *more, "data.eval_split=null", "trainer.schedule=constant"],
        )  # fmt: skip
        folder = run_recipe(recipe)
        about = json.loads((folder / "run.json").read_text())
        whole = about["trained_parameters"] == about["parameters"]
        assert whole == (name == "all")
        if name == "memory":
            assert about["trained_parameters"] == about["memory_parameters"]
        # What the base has already is not saved again, unless it was trained.
        held = json.loads((folder / "config.json").read_text())["base_included"]
        assert held == whole
        memwrap.load(folder)


def test_a_stage_hands_over_to_the_next(base: Path, documents: Path, tmp_path: Path) -> None:
    """What stage 1 trained is where stage 2 starts; what stage 2 adds is new."""
    own = [entry for entry in SMALL if "num_memory_tokens" not in entry]
    own += [f"model.name={base}", f"data.source={documents}", "data.eval_split=null"]
    path, first, second = ROOT / "recipes" / "hmt_lora.yaml", tmp_path / "1", tmp_path / "2"
    run_recipe(load_recipe(path, [*own, "memory.recall=false", f"output={first}"]))
    stage = load_recipe(path, [*own, f"init_from={first}", f"output={second}"])
    trained = memwrap.load(first)
    want, new = trained.weights_to_save(False), memwrap.wrap(trained.backbone, "hmt", d_mem=64)
    model, _ = build_model(stage)
    got = model.weights_to_save(False)
    assert any("lora_" in name for name in want)
    assert all(torch.equal(got[name].float(), value.float()) for name, value in want.items())
    added = {f"memory_modules.hmt.{n}" for n in ("summary", "query.weight", "key.weight")}
    assert got.keys() - want.keys() == added and added <= new.weights_to_save(False).keys()
    run_recipe(stage)
    assert memwrap.load(second).memory_configs[0].recall  # type: ignore[attr-defined]
    assert load_recipe(second / "recipe.yaml").init_from == str(first)
    # What does not fit is said, and nothing is silently lost.
    back = load_recipe(path, [*own, "memory.recall=false", f"init_from={second}", "output=x"])
    with pytest.raises(ValueError, match=r"`init_from` .* which this model has not"):
        build_model(back)
    with pytest.raises(ValueError, match="which this model has not"):
        build_model(load_recipe(path, [*own[:-4], "lora=null", *own[-3:], f"init_from={first}"]))
    with pytest.raises(ValueError, match=r"has shape \(2, "):
        build_model(load_recipe(path, [*own, "lora.r=3", f"init_from={first}", "output=x"]))
    other = small("rmt_lora_tiny", base, documents, tmp_path / "x", f"init_from={first}")
    with pytest.raises(ValueError, match=r"the memories \['hmt'\], this model \['rmt'\]"):
        build_model(other)
    with pytest.raises(ValueError, match="holds no saved model"):
        preflight(load_recipe(path, [*own, f"init_from={documents}", "output=runs/none"]))


@pytest.mark.parametrize("recipe", ["autocompressor_lora", "memoryprompt"])
def test_the_recipes_of_other_token_memories_run(
    recipe: str, base: Path, documents: Path, tmp_path: Path
) -> None:
    own = [entry for entry in SMALL if recipe != "memoryprompt" or not entry.startswith("lora")]
    own += [f"model.name={base}", f"data.source={documents}", f"output={tmp_path / 'run'}"]
    folder = run_recipe(load_recipe(ROOT / "recipes" / f"{recipe}.yaml", own))
    about = json.loads((folder / "run.json").read_text())
    only_memory = about["trained_parameters"] == about["memory_parameters"]
    assert only_memory == (recipe == "memoryprompt")
    assert [row["step"] for row in log_of(folder) if "loss" in row] == [1, 2]
    memwrap.load(folder)


def test_resuming_gives_what_one_run_gives(base: Path, documents: Path, tmp_path: Path) -> None:
    more = ["trainer.schedule=constant", "trainer.save_every=2", "data.eval_split=null"]

    def run(folder: str, *own: str) -> Path:
        output = tmp_path / folder
        return run_recipe(small("armt_lora_tiny", base, documents, output, *more, *own))

    whole = run("whole", "trainer.steps=4")
    run("parts", "trainer.steps=2")
    parts = run("parts", "trainer.steps=4", "resume=true")
    losses = [[row["loss"] for row in log_of(f) if "loss" in row] for f in (whole, parts)]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    want, got = (dict(memwrap.load(f).named_parameters()) for f in (whole, parts))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)
    other = small("armt_lora_tiny", base, documents, parts, "resume=true", "memory.d_mem=16")
    with pytest.raises(ValueError, match="has `memory`"):
        preflight(other)


def test_a_time_limit_stops_cleanly(base: Path, documents: Path, tmp_path: Path) -> None:
    output = tmp_path / "short"
    more = ["trainer.steps=100000", "trainer.max_minutes=1e-4", "trainer.save_every=100"]
    run_recipe(small("rmt_lora_tiny", base, documents, output, *more, "data.eval_split=null"))
    about = json.loads((output / "run.json").read_text())
    assert about["stopped_by"] == "trainer.max_minutes" and about["steps"] < 100
    assert (output / "checkpoints" / f"checkpoint-{about['steps']}").is_dir()
    memwrap.load(output)


def test_what_is_wrong_here_is_seen_before_loading(
    base: Path, documents: Path, tmp_path: Path
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="overwrite=true"):
        preflight(small("armt_lora_tiny", base, documents, used))
    preflight(small("armt_lora_tiny", base, documents, used, "overwrite=true"))
    with pytest.raises(ValueError, match="no checkpoint"):
        preflight(small("armt_lora_tiny", base, documents, used, "resume=true"))
    with pytest.raises(ValueError, match="a file; give a folder"):
        preflight(small("armt_lora_tiny", base, documents, used / "note.txt"))
    with pytest.raises(ValueError, match="no such file or folder"):
        preflight(small("armt_lora_tiny", base, tmp_path / "none", tmp_path / "new"))
    with pytest.raises(ValueError, match="no such folder"):
        preflight(small("armt_lora_tiny", tmp_path / "none", documents, tmp_path / "new"))


def test_a_file_sends_a_run_nowhere(tmp_path: Path) -> None:
    """Whoever runs a recipe need not have written it: a tracker stands on the command line."""
    path = tmp_path / "recipe.yaml"
    text = (ROOT / "recipes" / "armt_lora_tiny.yaml").read_text()
    path.write_text(text.replace("trainer:\n", "trainer:\n  report_to: wandb\n"))
    with pytest.raises(ValueError, match=r"`trainer\.report_to` sends the run elsewhere"):
        load_recipe(path)
    loaded = load_recipe(path, ["trainer.report_to=wandb,tensorboard"])
    assert loaded.trainer.trackers == ["wandb", "tensorboard"]
    path.write_text(text.replace("trainer:\n", "trainer:\n  report_to: tensorboard\n"))
    assert load_recipe(path).trainer.trackers == ["tensorboard"]
    assert load_recipe("armt_lora_tiny").trainer.trackers == []


def test_a_server_is_named_on_the_command_line_alone(tmp_path: Path) -> None:
    """Whatever key leads there: it would be sent this machine's credentials."""
    key = "data.options.data_files"
    path = write(
        tmp_path, output="runs/x", memory={"name": "rmt"},
        data={"source": "datasets:json", "options": {"data_files": "s3://bucket/x"}},
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"`{key}` is a server"):
        load_recipe(path)
    recipe = load_recipe(path, [f"{key}=s3://other/x"])
    assert recipe.data is not None and recipe.data.options == {"data_files": "s3://other/x"}
