"""What transformers' model classes offer in public: each name works here, or is refused by name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

import memwrap
from memwrap.testing.families import build
from memwrap.testing.helpers import error_of, ids, wrapped


def names(text: str) -> list[str]:
    return text.split()


WORKS = names("""
activation_checkpointing_disable activation_checkpointing_enable active_adapters add_adapter
add_model_tags base_model base_model_prefix can_generate can_record_outputs
compute_transition_scores config_class cuda delete_adapter device disable_adapters
disable_input_require_grads dtype dummy_inputs enable_adapters enable_input_require_grads eval
float from_pretrained generate generation_config_class get_adapter_state_dict get_compiled_call
get_correct_attn_implementation get_correct_experts_implementation get_decoder get_encoder
get_expanded_tied_weights_keys get_experts_implementation get_input_embeddings
get_memory_footprint get_output_embeddings get_parameter_or_buffer
gradient_checkpointing_disable gradient_checkpointing_enable half heal_tokens init_weights
initialize_weights input_modalities is_activation_checkpointing is_backend_compatible
is_custom_code is_gradient_checkpointing is_remote_code load_adapter loss_function
main_input_name mark_tied_weights_as_initialized model_tags named_non_persistent_buffers
num_parameters output_modalities post_init prepare_inputs_for_generation push_to_hub
register_for_auto_class resize_token_embeddings retrieve_modules_from_names save_pretrained
set_adapter set_attn_implementation set_decoder set_encoder set_experts_implementation
set_input_embeddings set_output_embeddings set_use_kernels supports_gradient_checkpointing
tie_weights to train use_kernels warn_if_padding_and_no_attention_mask
""")
REFUSED = names("""
continuous_batching_context_manager destroy_cached_continuous_batching_manager
enable_peft_hotswap generate_batch init_continuous_batching dequantize get_position_embeddings
resize_position_embeddings
""")
# Of transformers' own loading and its parallel plans, which a wrapped model does not go through.
INSIDE = names("""
adjust_generation_fn barrier_after_gathered_checkpoint_save ep_plan fsdp_plan fsdp_size
gather_sharded_state_dict_for_save get_init_context init_parallel_plans
is_distributed_loading_by_transformers load_custom_generate maybe_distribute_model pp_plan
prepare_distribute_model save_distributed_checkpoint should_save_on_this_rank
supports_context_parallel supports_pp_plan supports_tp_plan tp_plan tp_size
""")


def public_names() -> set[str]:
    classes = {*PreTrainedModel.__mro__, *GenerationMixin.__mro__} - {*nn.Module.__mro__}
    return {n for kind in classes for n in vars(kind) if not n.startswith("_")}


def test_every_public_name_is_decided() -> None:
    decided = [*WORKS, *REFUSED, *INSIDE]
    assert len(decided) == len(set(decided))
    new = sorted(public_names() - set(decided))
    assert not new, f"decide: does it work on a wrapped model, or is it refused? {new}"


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_is_refused(name: str) -> None:
    model = wrapped("rmt")
    arguments = [8] if name == "resize_position_embeddings" else []
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        getattr(model, name)(*arguments)
    assert len(str(caught.value)) < 500


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_what_leaves_a_model_as_it_is() -> None:
    model, text = wrapped("armt"), ids(2, 20)
    want = model(text).logits
    calls: dict[str, Any] = {
        "add_model_tags": ["mine"], "disable_input_require_grads": None, "tie_weights": None,
        "enable_input_require_grads": None, "init_weights": None, "post_init": None,
        "initialize_weights": None, "set_use_kernels": False, "float": None, "eval": None,
        "set_attn_implementation": "eager", "set_decoder": model.get_decoder(),
        "set_experts_implementation": "eager", "register_for_auto_class": None,
        "warn_if_padding_and_no_attention_mask": (text, None), "cuda": None,
        "mark_tied_weights_as_initialized": (None,),
    }  # fmt: skip
    for name, value in calls.items():
        if name not in public_names() or name in ("cuda", "mark_tied_weights_as_initialized"):
            continue  # needs a GPU; of loading
        if name == "disable_input_require_grads":
            model.enable_input_require_grads()
        given = () if value is None else value if isinstance(value, tuple) else (value,)
        getattr(model, name)(*given)
        assert error_of(model(text).logits, want) < 1e-5, name
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    assert model(**model.dummy_inputs).logits.shape[-1] == model.config.vocab_size
    assert model.dtype == torch.float32 and model.can_generate()
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(model.config, name) == getattr(model.backbone.config, name)
        setattr(model.config, name, 7)  # trainers put a tokenizer's there
        assert getattr(model.config, name) == 7
    scores = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3}
    out = model.generate(text, do_sample=False, eos_token_id=None, pad_token_id=0, **scores)
    assert model.compute_transition_scores(out.sequences, out.scores).shape == (2, 3)
    model.resize_token_embeddings(140)
    assert model(text).logits.shape[-1] == model.config.vocab_size == 140


@pytest.mark.parametrize("memory", ["rmt", "armt", "window", "knnlm"])
def test_copies_and_pickles(memory: str) -> None:
    model, text = wrapped(memory), ids(2, 20)
    want = model(text).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(text).logits, want)
        with torch.no_grad():
            other.get_input_embeddings().weight.add_(1.0)
        base = memwrap.unwrap(other)
        assert type(base) is type(build("llama")) and "Memory" not in repr(base)
    assert torch.equal(model(text).logits, want)


def test_attention_can_be_chosen_after_wrapping() -> None:
    model, text = wrapped("window"), ids(2, 20)
    want = model(text).logits
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert error_of(model(text).logits, want) < 1e-5
    with pytest.raises(ValueError, match="segments need explicit masks"):
        model.set_attn_implementation("flash_attention_2")
    assert memwrap.unwrap(model).config._attn_implementation == "sdpa"


def test_options_of_loading_and_saving(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, text = wrapped("armt", base=base), ids(2, 20)
    want = model(text).logits
    model.save_pretrained(tmp_path / "named")
    model.save_pretrained(tmp_path / "all" / "inner", include_base=True, max_shard_size="10KB")
    assert len(list((tmp_path / "all" / "inner").glob("model-*.safetensors"))) > 3
    auto = AutoModelForCausalLM.from_pretrained
    for given in (
        {"subfolder": "inner"},
        {"subfolder": "inner", "cache_dir": tmp_path / "cache", "local_files_only": True},
        {"subfolder": "inner", "attn_implementation": "eager"},
        {"subfolder": "inner", "dtype": torch.float32, "low_cpu_mem_usage": True},
        {"subfolder": "inner", "experts_implementation": "eager", "use_kernels": False},
    ):
        for load in (auto, memwrap.load):
            got = load(tmp_path / "all", **given)
            assert error_of(got(text).logits, want) < 1e-5
            chosen = given.get("attn_implementation", "sdpa")
            assert got.backbone.config._attn_implementation == chosen
    for load in (auto, memwrap.load):
        for folder in (tmp_path / "named", tmp_path / "all" / "inner"):
            got, report = load(folder, output_loading_info=True, attn_implementation="eager")
            assert not any(report.values()) and got.config._name_or_path == str(folder)
            assert got.backbone.config._attn_implementation == "eager"
            assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    config = AutoConfig.from_pretrained(tmp_path / "named")
    assert error_of(auto(tmp_path / "named", config=config)(text).logits, want) == 0.0
    config.memories = [{**config.memories[0], "segment_size": 16}]
    with pytest.raises(ValueError, match="`memories` cannot be changed"):
        auto(tmp_path / "named", config=config)
    with pytest.raises(ValueError, match="`config` is a LlamaConfig"):
        memwrap.load(tmp_path / "named", config=base.config)
    with pytest.raises((ValueError, FileNotFoundError)):
        memwrap.load(tmp_path / "all", subfolder="../named")
    with pytest.raises(FileNotFoundError, match="no folder other"):
        memwrap.load(tmp_path / "all", subfolder="other")
    for wrong in ({"safe_serialization": False}, {"variant": "fp16"}, {"max_shard": "1GB"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.save_pretrained(tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()
