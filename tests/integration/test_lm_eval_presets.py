"""Presets of the harness for long texts, on local data in the form of the published ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.assets import asset
from memwrap.cli import lm_eval_model as harness
from memwrap.cli.lm_eval_presets import expanded, load_preset, presets, tokenizer_place
from memwrap.testing.helpers import randomise

HARNESS = Path(lm_eval.tasks.__file__).parent
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back. "
MANY = FILLER * 12
# Tasks by the names that presets have: the harness's own settings (prompts, scores, stops) or,
# where these fetch data while they load, a copy; and rows with the fields of the published data.
STAND_INS: dict[str, tuple[str | dict[str, Any], list[dict[str, Any]]]] = {
    "babilong_qa1": (
        "babilong/babilong_qa1.yaml",
        [{"input": f"{MANY}Mary went to the {room}. {FILLER}", "question": "Where is Mary? ",
          "target": room} for room in ("garden", "office")],
    ),
    "niah_single_1": (
        {
            "doc_to_text": "{{input}}", "doc_to_target": "{{outputs}}",
            "gen_prefix": "{{gen_prefix}}", "target_delimiter": " ",
            "output_type": "generate_until",
            "generation_kwargs": {
                "do_sample": False, "temperature": 0.0, "max_gen_toks": 12, "until": [],
            },
        },
        [{"input": f"A special magic number is hidden within the following text.\n{MANY}One of the "
          f"special magic numbers for cat is: {n}.\nWhat is the special magic number for cat?",
          "outputs": [str(n)], "max_length": 8192, "length": 400, "index": 0,
          "gen_prefix": "The special magic number for cat mentioned in the provided text is"}
         for n in (1234567, 7654321)],
    ),
    "longbench2": (
        "longbench2/_longbench_common_yaml",
        [{"context": MANY, "question": "What is green?", "choices": ["sky", "grass", "tea", "I"],
          "answer": "B"}],
    ),
    "infinitebench_passkey": (
        "infinitebench/infinitebench_passkey.yaml",
        [{"id": 0, "context": f"{MANY}The pass key is 71432. Remember it.", "answer": ["71432"],
          "input": "What is the pass key?", "options": []}],
    ),
    "infinitebench_longbook_choice_en": (
        "infinitebench/infinitebench_longbook_choice_en.yaml",
        [{"id": 0, "context": MANY, "input": "Which is blue?", "answer": ["sky"],
          "options": ["sky", "grass", "sun", "tea"]}],
    ),
    "longbench_trec": (
        {  # its own scores need packages for Chinese
            "output_type": "generate_until",
            "doc_to_text": "Please determine the type of the question below. Here are some "
            "examples of questions.\n\n{{context}}\n{{question}}",
            "doc_to_target": "{{answers}}", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {
                "max_gen_toks": 64, "temperature": 1, "do_sample": False, "until": ["\n"],
            },
        },
        [{"context": f"Question: What is grass?\nType: Entity\n{MANY}", "question": "Who am I?",
          "answers": "Human", "all_classes": ["Human", "Entity"]}],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, (settings, rows) in STAND_INS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        own: dict[str, Any] = {
            "task": name, "dataset_path": "json", "dataset_name": None, "custom_dataset": None,
            "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        }  # fmt: skip
        text = ""
        if isinstance(settings, str):
            own["include"] = str(HARNESS / settings)
        else:
            own |= settings
        if "max_length" in rows[0]:
            ruler = "lm_eval.tasks.ruler.common_utils"
            text = f"process_results: !function {ruler}.process_results\nmetric_list:\n"
            text += '  - metric: "8192"\n    higher_is_better: true\n'
            text += f"    aggregation: !function {ruler}.aggregate_metrics\n"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own) + text)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(asset("tiny-lm"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, max_position_embeddings=64,
    )  # fmt: skip
    model = memwrap.wrap(LlamaForCausalLM(config), "armt", segment_size=32, num_memory_tokens=2)
    randomise(model).save_pretrained(folder, include_base=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(tasks: Path, saved: Path) -> dict[str, Any]:
    """Results of every preset, of the tasks that have a stand-in; one start of the harness."""
    lm = harness.MemwrapLM(str(saved), device="cpu")
    results: dict[str, Any] = {"lm": lm}
    for name in presets():
        settings = load_preset(name, model=str(saved))
        chosen = [task for task in settings["tasks"] if task in STAND_INS]
        assert chosen, name
        assert settings["model"] == "memwrap" and settings["batch_size"] == 1
        manager = TaskManager(
            include_path=str(tasks), include_defaults=False, metadata=settings.get("metadata")
        )
        results[name] = simple_evaluate(
            lm, tasks=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True,
            apply_chat_template=settings.get("apply_chat_template", False),
            fewshot_as_multiturn=settings.get("fewshot_as_multiturn", False),
        )  # fmt: skip
    return results


MOST = {
    "babilong_qa1": 16, "niah_single_1": 12, "infinitebench_passkey": 6,
    "infinitebench_longbook_choice_en": 40, "longbench_trec": 64,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("preset", presets())
def test_a_preset_reads_whole_texts_and_reports_what_the_model_says(
    found: dict[str, Any], preset: str
) -> None:
    lm, result = found["lm"], found[preset]
    for name, samples in result["samples"].items():
        rows = STAND_INS[name][1]
        assert len(samples) == len(rows)
        for sample in samples:
            if name == "longbench2":
                check_choices(lm, sample)
                continue
            prompt = sample["arguments"][0][0]
            assert MANY.strip() in prompt  # nothing is cut
            ids = lm.tokenizer(
                prompt, add_special_tokens=not prompt.startswith(lm.tokenizer.bos_token),
                return_tensors="pt",
            ).input_ids  # fmt: skip
            assert ids.shape[1] > 3 * lm.model.parts.config.max_position_embeddings
            assert ids[0].tolist().count(lm.tokenizer.bos_token_id) <= 1
            said = lm.model.generate(
                ids, max_new_tokens=MOST[name], do_sample=False,
                pad_token_id=lm.tokenizer.eos_token_id,
            )  # fmt: skip
            text = lm.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)
            stops = sample["arguments"][0][1]["until"]
            for stop in stops if isinstance(stops, list) else [stops]:
                text = text.split(stop)[0]
            assert sample["resps"][0][0] == text
            chat = preset in ("babilong", "ruler")
            assert prompt.startswith(lm.tokenizer.bos_token) == chat
        values = [v for k, v in result["results"][name].items() if k.endswith(",none")]
        # RULER says -1 of a length that has no text.
        numbers = [v for v in values if isinstance(v, float) and (v != -1 or preset != "ruler")]
        assert numbers and all(0 <= v <= 1 for v in numbers)


@torch.no_grad()
def check_choices(lm: Any, sample: dict[str, Any]) -> None:
    """Log-likelihoods of the letters are those of the whole text."""
    for index, [(response, _)] in enumerate(sample["resps"]):
        context, letter = sample["arguments"][index]
        ids = torch.tensor([lm.tokenizer(context).input_ids])
        wanted = lm.tokenizer(letter, add_special_tokens=False).input_ids
        logits = lm.model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
        assert len(wanted) == 1
        assert float(response) == pytest.approx(float(logits[wanted[0]]), abs=1e-4)


@pytest.mark.slow
def test_chat_templates_and_examples_stand_in_one_turn(found: dict[str, Any]) -> None:
    prompt = found["babilong"]["samples"]["babilong_qa1"][0]["arguments"][0][0]
    assert prompt.count("user: ") == 1 and prompt.count("Where is ") == 3
    assert prompt.endswith("assistant: ")
    prompt = found["ruler"]["samples"]["niah_single_1"][0]["arguments"][0][0]
    assert prompt.endswith("mentioned in the provided text is")


def test_what_the_command_is_given(saved: Path) -> None:
    with expanded(["--tasks", "x"]) as own:
        assert own == ["--tasks", "x"]
    words = ["--preset", "ruler", "--lengths", "4096,32768", "--limit", "5", "--model_args"]
    with expanded([*words, f"pretrained={saved},dtype=float32"]) as own:
        assert own[:2] == ["run", "--config"]
        assert own[3:] == ["--limit", "5", "--model_args", f"pretrained={saved},dtype=float32"]
        written = yaml.safe_load(Path(own[2]).read_text())
    assert written["metadata"] == {"max_seq_lengths": [4096, 32768], "tokenizer": str(saved)}
    assert not Path(own[2]).exists()
    assert load_preset("babilong", [32768])["metadata"] == {"max_seq_lengths": "32k"}
    assert (
        tokenizer_place("armt-lm") == asset("tiny-lm")
        or (
            asset("armt-lm") / "tokenizer_config.json"  # type: ignore[operator]
        ).is_file()
    )
    for preset, lengths, match in [
        ("babylon", [], "Did you mean 'babilong'"), ("ruler", [5000], "no metric for 5000"),
        ("babilong", [1024, 2048], "one length a run"), ("longbench2", [1024], "leave --lengths"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            load_preset(preset, lengths)
    with pytest.raises(ValueError, match="give numbers"), expanded([*words[:2], "--lengths", "4k"]):
        pass


@pytest.mark.slow
def test_the_harness_has_the_presets_tasks() -> None:
    known = set(TaskManager().all_tasks)
    for name in presets():
        assert set(load_preset(name)["tasks"]) <= known, name


def test_a_base_gets_a_memory_by_its_arguments() -> None:
    lm = harness.MemwrapLM(
        str(asset("tiny-lm")), memory="window", segment_size=32, window_size=64, device="cpu",
        max_length=500,
    )  # fmt: skip
    assert lm.model.memories["window"].config.window_size == 64
    assert lm.max_length == 500
