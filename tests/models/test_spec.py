"""config.json in its layouts: published ones, those of transformers 5, ours, and those that are
refused.
"""

import copy
import dataclasses
import math

import pytest
import transformers

from crossin_jax.config import Architecture, UserError
from crossin_jax.models.spec import (
    FAMILIES,
    ModelSpec,
    Rope,
    spec_from_architecture,
    spec_from_hf,
    spec_to_hf,
)
from tests.models.published import (
    CHECKPOINTS,
    GEMMA3_4B,
    GEMMA3_27B,
    LLAMA3,
    LLAMA31_8B,
    MISTRAL_V1,
)

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
    assert gemma2.query_scale == 144**-0.5 and gemma2.local_layers[:3] == (True, False, True)
    assert (gemma2.attention_soft_cap, gemma2.final_soft_cap) == (50.0, 30.0)
    gemma3 = spec["gemma-3-27b-it"]
    assert gemma3.local_layers[:7] == (True,) * 5 + (False, True) and gemma3.window == 1024
    assert gemma3.rope == Rope(1e6, "linear", 8.0) and gemma3.local_rope == Rope(10000.0)
    assert (gemma3.vocab_size, gemma3.tie_embeddings, gemma3.attention_soft_cap) == (
        262_208,
        True,
        None,
    )
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
    config = CHECKPOINTS["Qwen/Qwen2.5-7B"][0] | {
        "use_sliding_window": True,
        "max_window_layers": 20,
    }
    spec = read(config)
    assert spec.local_layers == (False,) * 20 + (True,) * 8 and read(spec_to_hf(spec)) == spec
    kinds = ["full_attention", "sliding_attention"] * 14
    assert read(config | {"layer_types": kinds}).local_layers[:2] == (False, True)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (
            LLAMA31_8B,
            {"model_type": "lama"},
            "model_type='lama' is not supported; did you mean llama",
        ),
        (LLAMA31_8B, {"model_type": "mixtral"}, "not supported.*\n.*llama.*mistral.*gemma2.*qwen3"),
        (LLAMA31_8B, {"model_type": None}, "model_type=None"),
        (
            LLAMA31_8B,
            {"rope_scaling": {"rope_type": "su", "factor": 4.0}},
            "rope type 'su'.*default, linear, llama3, yarn, dynamic, longrope",
        ),
        (
            LLAMA31_8B,
            {"rope_parameters": {"rope_type": "yarm", "factor": 4.0}, "rope_scaling": None},
            "rope type 'yarm' is not supported; did you mean yarn",
        ),
        (
            LLAMA31_8B,
            {"rope_parameters": {"rope_theta": 1e6}},
            r"rope_scaling replaces rope_parameters.*\n?.*rope_theta=1000000.0 becomes 500000.0",
        ),
        (
            LLAMA31_8B,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "rope_scaling": None},
            "rope_parameters by layer type are not supported for llama",
        ),
        (
            LLAMA31_8B,
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor of the rope has 1 entries; it takes 64",
        ),
        (
            LLAMA31_8B,
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "factor"}},
            "'factor' is missing",
        ),
        (LLAMA31_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA31_8B, {"attention_bias": True}, "attention_bias=true"),
        (LLAMA31_8B, {"hidden_act": "relu2"}, "activation 'relu2'"),
        (LLAMA31_8B, {"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
        (LLAMA31_8B, {"num_key_value_heads": 5}, "multiple"),
        (LLAMA31_8B, {"quantization_config": {"quant_method": "awq"}}, r"stored quantized \(awq\)"),
        (
            CHECKPOINTS["Qwen/Qwen2.5-7B"][0],
            {"layer_types": ["linear_attention"] * 28},
            "linear_attention",
        ),
        (
            CHECKPOINTS["Qwen/Qwen2.5-7B"][0],
            {"layer_types": ["full_attention"] * 3},
            "has 3 entries",
        ),
        (GEMMA3_27B, {"text_config": None}, "'text_config' is missing"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config, changes, words):
    with pytest.raises(UserError, match=words) as error:
        read(config | changes)
    assert str(error.value).startswith("folder/config.json") and str(error.value).count("\n") <= 2


UNREAD = {
    "Llama-3.1-8B": {"sliding_window": 0, "query_pre_attn_scalar": "x", "no_rope_layers": {}},
    "gemma-2b": {"hidden_act": "", "use_sliding_window": "no", "rope_local_base_freq": -1},
    "Mistral-7B-v0.1": {"max_window_layers": -1, "final_logit_softcapping": 0},
    "gemma-2-27b": {"hidden_act": "https://me:secret@host", "sliding_window_pattern": 0},
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_only_other_families_read_is_not_judged(name):
    """transformers passes over it too. The same values are refused where they are read."""
    config = next(c for full, (c, _) in CHECKPOINTS.items() if full.endswith(f"/{name}"))
    assert read(copy.deepcopy(config) | UNREAD[name]) == read(copy.deepcopy(config))


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MISTRAL_V1, {"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        (GEMMA3_4B, {"text_config": {"query_pre_attn_scalar": "x"}}, "query_pre_attn_scalar='x'"),
        (LLAMA31_8B, {"hidden_act": ""}, "activation '' is not supported"),
        (LLAMA31_8B, {"rope_scaling": {"rope_type": "", "factor": 2.0}}, "rope type ''"),
        (LLAMA31_8B, {"model_type": ""}, "model_type='' is not supported"),
    ],
)
def test_what_is_read_is_judged(config, changes, words):
    with pytest.raises(UserError, match=words):
        read(copy.deepcopy(config) | changes)


def test_a_missing_field_is_named():
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ):
        with pytest.raises(UserError, match=f"config.json: the field '{field}' is missing"):
            read({k: v for k, v in MISTRAL_V1.items() if k != field})
    # optional ones mean what transformers takes them to mean
    assert (
        read({k: v for k, v in LLAMA31_8B.items() if k != "num_key_value_heads"}).num_kv_heads == 32
    )
    assert read(GEMMA3_4B).max_length == 131_072


def test_every_field_is_needed_by_a_published_checkpoint():
    """A field that has one value everywhere would be a constant."""
    specs = [read(config) for config, _ in CHECKPOINTS.values()]
    for field in dataclasses.fields(specs[0]):
        assert len({getattr(spec, field.name) for spec in specs}) > 1, field.name
    assert {spec.model_type for spec in specs} == set(FAMILIES) - {"gemma3"}


def test_a_model_from_the_configuration_is_a_llama():
    spec = spec_from_architecture(
        Architecture(width=64, num_heads=4, num_kv_heads=2), vocab_size=300
    )
    assert spec.head_width == 16 and spec.tie_embeddings and read(spec_to_hf(spec)) == spec
    with pytest.raises(UserError, match="width=60 does not split"):
        spec_from_architecture(Architecture(width=60, num_heads=7), vocab_size=300)
    with pytest.raises(UserError, match="num_kv_heads=3"):
        spec_from_architecture(Architecture(width=64, num_heads=4, num_kv_heads=3), vocab_size=300)


# ---- every field of config.json, family by family

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": False,
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
BASES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 20},
    "gemma3_text": {"sliding_window": 16, "query_pre_attn_scalar": 20, "rope_local_base_freq": 2e4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "smollm3": {"use_sliding_window": True, "sliding_window": 16, "head_dim": 8},
    "phi3": {"sliding_window": 16, "head_dim": 8},
}
# Transformers refuses the others there.
SCALABLE = tuple(family for family in BASES if family != "phi3")
DIVISORS = [1.0, 1.5, 2.5, 4.0]
WITH_SCALAR, WINDOWED = (
    ("gemma2", "gemma3_text"),
    ("gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3"),
)
# (families, changes to config.json, what of the spec they change)
FIELDS = [
    (tuple(BASES), {"vocab_size": 98}, {"vocab_size": 98}),
    (tuple(BASES), {"hidden_size": 60}, {"width": 60}),
    (tuple(BASES), {"intermediate_size": 96}, {"ff_width": 96}),
    (("llama", "gemma"), {"num_hidden_layers": 5}, {"num_layers": 5}),
    (
        ("smollm3",),
        {"num_hidden_layers": 3},
        {
            "num_layers": 3,
            "unrotated_layers": (False,) * 3,
            "local_layers": (),
            "window": None,
        },
    ),
    (
        ("smollm3",),
        {"no_rope_layers": [0, 1, 1, 1]},
        {
            "unrotated_layers": (True, False, False, False),
            "local_layers": (True, False, False, False),
        },
    ),
    (
        ("smollm3",),
        {"no_rope_layer_interval": 2},
        {
            "unrotated_layers": (False, True, False, True),
            "local_layers": (False, True, False, True),
        },
    ),
    (("smollm3",), {"use_sliding_window": False}, {"window": None, "local_layers": ()}),
    (("mistral", "phi3"), {"num_hidden_layers": 5}, {"num_layers": 5, "local_layers": (True,) * 5}),
    (("gemma2",), {"num_hidden_layers": 3}, {"num_layers": 3, "local_layers": (True, False, True)}),
    (
        ("gemma3_text",),
        {"num_hidden_layers": 7},
        {"num_layers": 7, "local_layers": (True,) * 5 + (False, True)},
    ),
    (
        ("qwen2", "qwen3"),
        {"num_hidden_layers": 3},
        {"num_layers": 3, "local_layers": (False, False, True)},
    ),
    (tuple(BASES), {"num_attention_heads": 4}, {"num_heads": 4}),
    (tuple(BASES), {"num_key_value_heads": 3}, {"num_kv_heads": 3}),
    (tuple(BASES), {"num_key_value_heads": 6}, {"num_kv_heads": 6}),
    (
        ("llama", "mistral", "gemma", "qwen2", "qwen3", "smollm3", "phi3"),
        {"head_dim": 16},
        {"head_width": 16, "query_scale": 0.25},
    ),
    (WITH_SCALAR, {"head_dim": 16}, {"head_width": 16}),
    (WITH_SCALAR, {"query_pre_attn_scalar": 64}, {"query_scale": 0.125}),
    (tuple(BASES), {"max_position_embeddings": 300}, {"max_length": 300}),
    (tuple(BASES), {"rms_norm_eps": 1e-6}, {"norm_eps": 1e-6}),
    (tuple(BASES), {"tie_word_embeddings": True}, {"tie_embeddings": True}),
    (tuple(BASES), {"rope_theta": 7e3}, {"rope": Rope(7e3)}),
    (
        SCALABLE,
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope": Rope(5e5, "linear", 4.0)},
    ),
    (
        SCALABLE,
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope": Rope(5e5, "dynamic", 4.0)},
    ),
    (
        SCALABLE,
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.25,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "truncate": False,
            }
        },
        {
            "rope": Rope(
                5e5,
                "yarn",
                4.0,
                original_max_length=128,
                attention_factor=1.25,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            )
        },
    ),
    (
        ("phi3",),
        {
            "original_max_position_embeddings": 128,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": DIVISORS,
                "long_factor": DIVISORS[::-1],
            },
        },
        {
            "max_length": 128,
            "rope": Rope(
                5e5,
                "longrope",
                4.0,
                original_max_length=128,
                attention_factor=math.sqrt(1 + math.log(4) / math.log(128)),
                short_factors=tuple(DIVISORS),
                long_factors=tuple(DIVISORS[::-1]),
                extended_length=512,
            ),
        },
    ),
    (("phi3",), {"partial_rotary_factor": 0.5}, {"rope": Rope(5e5, fraction=0.5)}),
    (SCALABLE, {"rope_scaling": SCALED}, {"rope": Rope(5e5, "llama3", 8.0, 1.5, 5.0, 64)}),
    (("gemma3_text",), {"rope_local_base_freq": 5000.0}, {"local_rope": Rope(5000.0)}),
    (("mistral", "phi3", *WINDOWED), {"sliding_window": 24}, {"window": 24}),
    (("mistral", "phi3"), {"sliding_window": None}, {"window": None, "local_layers": ()}),
    (("gemma2",), {"attn_logit_softcapping": 30.0}, {"attention_soft_cap": 30.0}),
    (("gemma2",), {"attn_logit_softcapping": None}, {"attention_soft_cap": None}),
    (("gemma2",), {"final_logit_softcapping": 15.0}, {"final_soft_cap": 15.0}),
    (("gemma2",), {"final_logit_softcapping": None}, {"final_soft_cap": None}),
    (("gemma3_text",), {"final_logit_softcapping": 15.0}, {"final_soft_cap": 15.0}),
    (("gemma3_text",), {"sliding_window_pattern": 3}, {"local_layers": (True, True, False, True)}),
    (
        ("gemma3_text",),
        {"layer_types": [GLOBAL] * 4},
        {"window": None, "local_layers": (), "local_rope": None},
    ),
    (("gemma2",), {"layer_types": [GLOBAL] * 4}, {"window": None, "local_layers": ()}),
    (
        WINDOWED,
        {"layer_types": [LOCAL, GLOBAL, GLOBAL, LOCAL]},
        {"local_layers": (True, False, False, True)},
    ),
    (("qwen2", "qwen3"), {"max_window_layers": 1}, {"local_layers": (False, True, True, True)}),
    (("qwen2", "qwen3"), {"max_window_layers": 0}, {"local_layers": (True,) * 4}),
    (("qwen2", "qwen3"), {"max_window_layers": 4}, {"window": None, "local_layers": ()}),
    (("qwen2", "qwen3"), {"use_sliding_window": False}, {"window": None, "local_layers": ()}),
]
# Fields that an export writes in another way: as layer_types or as a list.
REWRITTEN = ("sliding_window_pattern", "max_window_layers", "use_sliding_window")
REWRITTEN += ("no_rope_layer_interval",)
CASES = [(family, change, effect) for families, change, effect in FIELDS for family in families]


@pytest.mark.parametrize(
    ("family", "change", "effect"),
    CASES,
    ids=[f"{family}-{','.join(change)}-{i}" for i, (family, change, _) in enumerate(CASES)],
)
def test_a_changed_field_changes_its_part_of_the_spec_and_comes_back(family, change, effect):
    """Nothing else moves; transformers reads the same of the file, and of the one that we write."""
    config = SMALL | {"model_type": family} | BASES[family]
    before, spec = read(config), read(config | change)
    assert spec == dataclasses.replace(before, **effect) != before
    assert theirs(config | change) == spec
    written = spec_to_hf(spec)
    assert read(written) == spec and theirs(written) == spec
    for name, value in change.items():
        if name not in REWRITTEN:
            assert written.get(name) == value or spec.window is None, name


def theirs(config):
    """The spec of what transformers makes of a config.json and would write itself."""
    return read(transformers.AutoConfig.for_model(**copy.deepcopy(config)).to_dict())


def test_the_cases_cover_every_number_of_a_spec():
    """What no case changes is a rule of its family; the two lists hold every field."""
    changed = {name for _, _, effect in CASES for name in effect}
    flags = {"activation", "qkv_bias", "qk_norm", "post_norms", "norm_offset", "scale_embedding"}
    flags |= {"fused_weights"}
    assert changed | flags | {"model_type"} == {f.name for f in dataclasses.fields(ModelSpec)}
    told = {family: read(SMALL | {"model_type": family} | BASES[family]) for family in BASES}
    gemma = {"norm_offset", "scale_embedding"}
    assert {
        family: {flag for flag in flags if getattr(spec, flag) is True}
        for family, spec in told.items()
    } == {
        "llama": set(),
        "mistral": set(),
        "gemma": gemma,
        "gemma2": gemma | {"post_norms"},
        "gemma3_text": gemma | {"post_norms", "qk_norm"},
        "qwen2": {"qkv_bias"},
        "qwen3": {"qk_norm"},
        "smollm3": set(),
        "phi3": {"fused_weights"},
    }
    assert {family: spec.activation for family, spec in told.items()} == {
        family: "gelu_tanh" if "gemma" in family else "silu" for family in BASES
    }


# No effect on logits: files and programs, dropout in training, the start of training, and a soft
# cap that Gemma 3 has in its configuration alone.
WITHOUT_EFFECT = {
    "architectures",
    "dtype",
    "_name_or_path",
    "transformers_version",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "use_cache",
    "attention_dropout",
    "embd_pdrop",
    "resid_pdrop",
    "initializer_range",
    "pretraining_tp",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_sliding_window_pattern",
}
REFUSED = {"attention_bias", "mlp_bias", "use_bidirectional_attention"}


@pytest.mark.parametrize("family", BASES)
def test_every_field_of_transformers_has_a_place(family):
    """A field that a later transformers brings has to be read, refused or shown to do nothing."""
    fields = transformers.AutoConfig.for_model(family).to_dict().keys()
    read_here = {name for case, change, _ in CASES for name in change if case == family}
    read_here |= {"model_type", "rope_parameters", "hidden_act", "hidden_activation"}
    refused = REFUSED & fields
    idle = {"attn_logit_softcapping"} if family == "gemma3_text" else set()
    assert fields <= read_here | refused | WITHOUT_EFFECT | idle
    assert not read_here & (REFUSED | WITHOUT_EFFECT)
    config = SMALL | {"model_type": family} | BASES[family]
    for name in refused:
        with pytest.raises(UserError, match=f"{name}=true is not supported for {family}"):
            read(config | {name: True})
        assert read(config | {name: False}) == read(config | {name: None}) == read(config)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize(
    "name", ["silu", "swish", "gelu_pytorch_tanh", "gelu_tanh", "gelu", "relu"]
)
def test_activations(family, name):
    """Gemma names its own in `hidden_activation`, and its `hidden_act` is not looked at."""
    wanted = {
        "silu": "silu",
        "swish": "silu",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_tanh": "gelu_tanh",
    }.get(name)
    field, other = "hidden_act", "hidden_activation"
    if "gemma" in family:
        field, other = other, field
    config = SMALL | {"model_type": family, field: name, other: "relu"} | BASES[family]
    if wanted is None:
        with pytest.raises(UserError, match=f"activation {name!r} is not supported"):
            read(config)
    else:
        assert read(config).activation == wanted
        assert read(spec_to_hf(read(config))).activation == wanted
    usual = "gelu_tanh" if "gemma" in family else "silu"
    assert read({key: value for key, value in config.items() if key != field}).activation == usual


@pytest.mark.parametrize("family", BASES)
def test_heads_whose_width_is_not_told_share_the_width_of_the_model(family):
    config = {key: value for key, value in SMALL.items() if key != "head_dim"}
    spec = read(config | {"model_type": family} | BASES[family])
    known = {"gemma3_text": 256, "qwen3": 128}.get(family, 48 // 6)  # the default of its class
    assert spec.head_width == known
    assert family in WITH_SCALAR or spec.query_scale == known**-0.5
    with pytest.raises(UserError, match="heads of width 7 .* their width even"):
        read(SMALL | BASES[family] | {"model_type": family, "head_dim": 7})


def test_what_a_file_leaves_out_means_the_default_of_its_class():
    """Field by field, transformers is asked what the field would have been."""
    own = {
        "gemma3_text": ("rope_local_base_freq", "sliding_window", "query_pre_attn_scalar"),
        "gemma2": ("sliding_window", "query_pre_attn_scalar"),
        "mistral": ("sliding_window",),
        "phi3": ("sliding_window",),
    }
    for family, more in BASES.items():
        config = SMALL | {"model_type": family} | more
        for name in ("tie_word_embeddings", "rope_theta", *own.get(family, ())):
            shorter = {key: value for key, value in config.items() if key != name}
            assert read(shorter) == theirs(shorter), (family, name)
    gemma3 = {"model_type": "gemma3_text"}
    assert read(gemma3) == theirs(gemma3)
    gemma2 = read(SMALL | {"model_type": "gemma2"} | BASES["gemma2"])
    assert (gemma2.attention_soft_cap, gemma2.final_soft_cap) == (50.0, 30.0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"partial_rotary_factor": 0.5, "rope_type": "default"}, "partial_rotary_factor=0.5"),
        ({"rope_type": "linear"}, "rope: the field 'factor' is missing"),
        ({"rope_type": "longrope"}, "rope: the field 'short_factor' is missing"),
        ({"rope_type": "yarn"}, "rope: the field 'factor' is missing"),
        ({"rope_type": "dynamic", "factor": None}, "rope: the field 'factor' is missing"),
        *(
            ({key: SCALED[key] for key in SCALED.keys() - {name}}, f"the field '{name}' is missing")
            for name in sorted(SCALED.keys() - {"rope_type"})
        ),
    ],
)
def test_a_rope_that_is_not_whole_is_refused_in_either_layout(values, words):
    config = SMALL | {"model_type": "llama"}
    for change in ({"rope_scaling": values}, {"rope_parameters": values | {"rope_theta": 5e5}}):
        with pytest.raises(UserError, match=words):
            read(config | change)


EDITED = {
    "yarn as on Qwen's cards": (
        "qwen2",
        {
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "type": "yarn",
            }
        },
    ),
    "yarn in place of a default rope": (
        "qwen3",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        },
    ),
    "a theta in both": (
        "llama",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4},
        },
    ),
    "scaling added to Gemma's global layers": (
        "gemma3_text",
        {
            "rope_parameters": {
                GLOBAL: {"rope_type": "default", "rope_theta": 1e6},
                LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            },
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "rope_parameters null": ("mistral", {"rope_parameters": None}),
    "rope_scaling null": (
        "mistral",
        {"rope_parameters": {"rope_theta": 2e4}, "rope_scaling": None},
    ),
    "rope_scaling empty": ("qwen2", {"rope_parameters": {"rope_theta": 2e4}, "rope_scaling": {}}),
    "layer_types null": ("gemma2", {"layer_types": None}),
    "heads null": ("llama", {"num_key_value_heads": None}),
    "quantization null": ("llama", {"quantization_config": None}),
    "a window that is off": ("qwen2", {"use_sliding_window": False, "sliding_window": None}),
}


@pytest.mark.parametrize("case", EDITED)
def test_a_config_as_people_edit_it_means_what_it_means_to_transformers(case):
    family, change = EDITED[case]
    config = SMALL | {"model_type": family} | BASES[family] | change
    spec = read(config)
    assert spec == theirs(config)
    assert read(spec_to_hf(spec)) == spec == theirs(spec_to_hf(spec))


def test_first_files_of_phi3_have_other_names_for_longrope():
    """transformers 5.24 means to read them, and asks for a field too much."""
    config = SMALL | {"model_type": "phi3", "original_max_position_embeddings": 128}
    specs = [
        read(
            config
            | BASES["phi3"]
            | {"rope_scaling": {"type": t, "short_factor": DIVISORS, "long_factor": DIVISORS}}
        )
        for t in ("longrope", "su", "yarn")
    ]
    assert specs[0] == specs[1] == specs[2] and specs[0].rope.kind == "longrope"


def test_a_theta_that_transformers_would_lose_is_refused():
    """There the base of rope_parameters gives way to the default of the class, without a word."""
    config = {name: value for name, value in SMALL.items() if name != "rope_theta"}
    config |= {
        "model_type": "qwen3",
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    assert theirs(config | BASES["qwen3"]).rope.theta == 10_000.0
    with pytest.raises(UserError, match="rope_theta=1000000.0 becomes 10000.0; move the fields"):
        read(config | BASES["qwen3"])


def test_layouts_of_rope():
    """The older name of the kind, and the theta of transformers 5 before that of transformers 4."""
    config = SMALL | {"model_type": "llama"}
    assert read(config | {"rope_scaling": {"type": "linear", "factor": 2}}).rope == Rope(
        5e5, "linear", 2.0
    )
    assert read(config | {"rope_parameters": {"rope_theta": 3e4}}).rope == Rope(3e4)
    assert read(config | {"rope_parameters": {"rope_type": "linear", "factor": 2}}).rope == Rope(
        5e5, "linear", 2.0
    )
    gemma3, both = SMALL | {"model_type": "gemma3_text"}, {GLOBAL: {"rope_theta": 1e6}}
    with pytest.raises(UserError, match="rope_parameters: the field 'sliding_attention' is miss"):
        read(gemma3 | {"rope_parameters": both})
    both = {
        GLOBAL: {"rope_theta": 1e6, "rope_type": "linear", "factor": 8},
        LOCAL: {"rope_theta": 3e3},
    }
    spec = read(gemma3 | {"rope_parameters": both})
    assert (spec.rope, spec.local_rope) == (Rope(1e6, "linear", 8.0), Rope(3e3))
    both[LOCAL] |= {"rope_type": "linear", "factor": 2}
    with pytest.raises(UserError, match="rope type 'linear' of the local layers is not supported"):
        read(gemma3 | {"rope_parameters": both})


@pytest.mark.parametrize("family", WITH_SCALAR)
@pytest.mark.parametrize("scalar", [1, 20, 168, 20.5])
def test_the_factor_on_scores_survives_a_file(family, scalar):
    """A whole number is written as one; a fraction comes back up to rounding."""
    spec = read(SMALL | {"model_type": family} | BASES[family] | {"query_pre_attn_scalar": scalar})
    assert spec.query_scale == scalar**-0.5
    written = spec_to_hf(spec)
    assert read(written).query_scale == pytest.approx(spec.query_scale, rel=1e-15)
    assert written["query_pre_attn_scalar"] == pytest.approx(scalar, rel=1e-15)
    assert isinstance(written["query_pre_attn_scalar"], type(scalar))
