"""config.json in its layouts: published ones, those of transformers 5, ours, and those that are refused."""

import copy
import dataclasses

import pytest
import transformers

from crossin_jax.config import Architecture, UserError
from crossin_jax.models.spec import FAMILIES, Rope, spec_from_architecture, spec_from_hf, spec_to_hf
from tests.models.published import CHECKPOINTS, GEMMA3_4B, GEMMA3_27B, LLAMA3, LLAMA31_8B, MISTRAL_V1

published = pytest.mark.parametrize("name", CHECKPOINTS)


def read(config):
    return spec_from_hf(config, "folder/config.json")


@published
def test_published_checkpoints_load_with_their_number_of_parameters(name):
    config, parameters = CHECKPOINTS[name]
    spec = read(copy.deepcopy(config))
    assert parameters is None or spec.num_parameters == parameters


def test_what_distinguishes_the_families():
    spec = {name.split("/")[1]: read(config) for name, (config, _) in CHECKPOINTS.items()}
    assert spec["Llama-3.1-8B"].rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert spec["Llama-2-7b-hf"].rope == Rope(10000.0)
    assert spec["Mistral-7B-v0.1"].window == 4096 and all(spec["Mistral-7B-v0.1"].local_layers)
    assert spec["Mistral-7B-v0.3"].window is None and spec["Mistral-7B-v0.3"].local_layers == ()
    assert spec["gemma-2b"].activation == "gelu_tanh" and spec["gemma-2b"].num_kv_heads == 1
    gemma2 = spec["gemma-2-27b"]
    assert gemma2.query_scale == 144 ** -0.5 and gemma2.local_layers[:3] == (True, False, True)
    assert (gemma2.attention_soft_cap, gemma2.final_soft_cap) == (50.0, 30.0)
    gemma3 = spec["gemma-3-27b-it"]
    assert gemma3.local_layers[:7] == (True,) * 5 + (False, True) and gemma3.window == 1024
    assert gemma3.rope == Rope(1e6, "linear", 8.0) and gemma3.local_rope == Rope(10000.0)
    assert (gemma3.vocab_size, gemma3.tie_embeddings, gemma3.attention_soft_cap) == (262_208, True, None)
    assert spec["gemma-3-4b-pt"].num_heads == 8 and spec["gemma-3-4b-pt"].head_width == 256
    assert spec["Qwen2.5-0.5B"].qkv_bias and not spec["Qwen2.5-0.5B"].qk_norm
    assert spec["Qwen3-0.6B"].qk_norm and spec["Qwen3-0.6B"].head_width == 128


@published
def test_transformers_reads_it_as_we_do_and_what_we_write_means_the_same(name):
    config = copy.deepcopy(CHECKPOINTS[name][0])
    spec = read(config)
    theirs = transformers.AutoConfig.for_model(**config)
    theirs = theirs.text_config if config["model_type"] == "gemma3" else theirs
    assert read(theirs.to_dict()) == spec  # the layout of transformers 5
    assert read(spec_to_hf(spec)) == spec
    assert read(transformers.AutoConfig.for_model(**spec_to_hf(spec)).to_dict()) == spec


def test_windows_of_some_qwen_layers_and_explicit_layer_types():
    config = CHECKPOINTS["Qwen/Qwen2.5-7B"][0] | {"use_sliding_window": True, "max_window_layers": 20}
    spec = read(config)
    assert spec.local_layers == (False,) * 20 + (True,) * 8 and read(spec_to_hf(spec)) == spec
    kinds = ["full_attention", "sliding_attention"] * 14
    assert read(config | {"layer_types": kinds}).local_layers[:2] == (False, True)


@pytest.mark.parametrize(("config", "changes", "words"), [
    (LLAMA31_8B, {"model_type": "lama"}, "model_type='lama' is not supported; did you mean llama"),
    (LLAMA31_8B, {"model_type": "mixtral"}, "not supported.*\n.*llama.*mistral.*gemma2.*qwen3"),
    (LLAMA31_8B, {"model_type": None}, "model_type=None"),
    (LLAMA31_8B, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'.*default, linear, llama3"),
    (LLAMA31_8B, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic'"),
    (LLAMA31_8B, {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}}, "'factor' is missing"),
    (LLAMA31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    (LLAMA31_8B, {"attention_bias": True}, "attention_bias=true"),
    (LLAMA31_8B, {"hidden_act": "relu2"}, "activation 'relu2'"),
    (LLAMA31_8B, {"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
    (LLAMA31_8B, {"num_key_value_heads": 5}, "multiple"),
    (LLAMA31_8B, {"quantization_config": {"quant_method": "awq"}}, r"stored quantized \(awq\)"),
    (CHECKPOINTS["Qwen/Qwen2.5-7B"][0], {"layer_types": ["linear_attention"] * 28}, "linear_attention"),
    (CHECKPOINTS["Qwen/Qwen2.5-7B"][0], {"layer_types": ["full_attention"] * 3}, "has 3 entries"),
    (GEMMA3_27B, {"text_config": None}, "'text_config' is missing")])
def test_what_is_not_supported_is_refused_by_name(config, changes, words):
    with pytest.raises(UserError, match=words) as error:
        read(config | changes)
    assert str(error.value).startswith("folder/config.json") and str(error.value).count("\n") <= 2


def test_a_missing_field_is_named():
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "max_position_embeddings", "rms_norm_eps"):
        with pytest.raises(UserError, match=f"config.json: the field '{field}' is missing"):
            read({k: v for k, v in MISTRAL_V1.items() if k != field})
    # optional ones mean what transformers takes them to mean
    assert read({k: v for k, v in LLAMA31_8B.items() if k != "num_key_value_heads"}).num_kv_heads == 32
    assert read(GEMMA3_4B).max_length == 131_072


def test_every_field_is_needed_by_a_published_checkpoint():
    """A field that has one value everywhere would be a constant."""
    specs = [read(config) for config, _ in CHECKPOINTS.values()]
    for field in dataclasses.fields(specs[0]):
        assert len({getattr(spec, field.name) for spec in specs}) > 1, field.name
    assert {spec.model_type for spec in specs} == set(FAMILIES) - {"gemma3"}


def test_a_model_from_the_configuration_is_a_llama():
    spec = spec_from_architecture(Architecture(width=64, num_heads=4, num_kv_heads=2), vocab_size=300)
    assert spec.head_width == 16 and spec.tie_embeddings and read(spec_to_hf(spec)) == spec
    with pytest.raises(UserError, match="width=60 does not split"):
        spec_from_architecture(Architecture(width=60, num_heads=7), vocab_size=300)
    with pytest.raises(UserError, match="num_kv_heads=3"):
        spec_from_architecture(Architecture(width=64, num_heads=4, num_kv_heads=3), vocab_size=300)
