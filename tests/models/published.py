"""What the config.json of published checkpoints says, as far as a spec reads it, and how many
parameters they have.

Transcribed, in the layout each repository uses; tests run without network.
"""

from typing import Any

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _config(
    model_type: str, D: int, F: int, L: int, N: int, K: int, V: int, length: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": N,
        "num_key_value_heads": K,
        "vocab_size": V,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        **more,
    }


def _gemma(D: int, F: int, L: int, N: int, K: int, H: int = 256) -> dict[str, Any]:
    return _config(
        "gemma",
        D,
        F,
        L,
        N,
        K,
        256_000,
        8192,
        head_dim=H,
        hidden_act="gelu",
        hidden_activation=None,
        rope_theta=10000.0,
        rope_scaling=None,
    )


def _gemma2(D: int, F: int, L: int, N: int, K: int, H: int, scalar: int) -> dict[str, Any]:
    return _config(
        "gemma2",
        D,
        F,
        L,
        N,
        K,
        256_000,
        8192,
        head_dim=H,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        rope_theta=10000.0,
        query_pre_attn_scalar=scalar,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def _qwen2(D: int, F: int, L: int, N: int, K: int, V: int, **more: Any) -> dict[str, Any]:
    return _config(
        "qwen2",
        D,
        F,
        L,
        N,
        K,
        V,
        32768,
        rope_theta=1e6,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=L,
        **more,
    )


def _qwen3(D: int, F: int, L: int, N: int, K: int, *, tied: bool) -> dict[str, Any]:
    return _config(
        "qwen3",
        D,
        F,
        L,
        N,
        K,
        151_936,
        40960,
        head_dim=128,
        rope_theta=1e6,
        rope_scaling=None,
        attention_bias=False,
        tie_word_embeddings=tied,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=L,
    )


MISTRAL_V1 = _config(
    "mistral",
    4096,
    14336,
    32,
    32,
    8,
    32000,
    32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
)
LLAMA31_8B = _config(
    "llama",
    4096,
    14336,
    32,
    32,
    8,
    128_256,
    131_072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=LLAMA3,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
GEMMA2_9B = _gemma2(3584, 14336, 42, 16, 8, 256, 256)
QWEN3_32B = _qwen3(5120, 25600, 64, 64, 8, tied=False)
# the text part omits what equals the defaults of transformers, as the multimodal repositories do
GEMMA3_27B = {
    "model_type": "gemma3",
    "architectures": ["Gemma3ForConditionalGeneration"],
    "mm_tokens_per_image": 256,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
}
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}

# name: (config.json, parameters of the text model; None where we know no published number)
CHECKPOINTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "meta-llama/Llama-2-7b-hf": (
        _config(
            "llama",
            4096,
            11008,
            32,
            32,
            32,
            32000,
            4096,
            rms_norm_eps=1e-5,
            rope_scaling=None,
            tie_word_embeddings=False,
        ),
        6_738_415_616,
    ),
    "meta-llama/Llama-3.1-8B": (LLAMA31_8B, 8_030_261_248),
    "meta-llama/Llama-3.2-1B": (
        _config(
            "llama",
            2048,
            8192,
            16,
            32,
            8,
            128_256,
            131_072,
            rms_norm_eps=1e-5,
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling=LLAMA3 | {"factor": 32.0},
            tie_word_embeddings=True,
        ),
        1_235_814_400,
    ),
    "mistralai/Mistral-7B-v0.1": (MISTRAL_V1, 7_241_732_096),
    "mistralai/Mistral-7B-v0.3": (
        MISTRAL_V1 | {"vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None},
        7_248_023_552,
    ),
    "google/gemma-2b": (_gemma(2048, 16384, 18, 8, 1), 2_506_172_416),
    "google/gemma-7b": (_gemma(3072, 24576, 28, 16, 16), 8_537_680_896),
    "google/gemma-2-2b": (_gemma2(2304, 9216, 26, 8, 4, 256, 256), 2_614_341_888),
    "google/gemma-2-9b": (GEMMA2_9B, 9_241_705_984),
    "google/gemma-2-27b": (_gemma2(4608, 36864, 46, 32, 16, 128, 144), 27_227_128_320),
    "google/gemma-3-1b-pt": (
        _config(
            "gemma3_text",
            1152,
            6912,
            26,
            4,
            1,
            262_144,
            32768,
            head_dim=256,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=256,
            rope_local_base_freq=10000,
            rope_theta=1_000_000,
            rope_scaling=None,
            sliding_window=512,
            sliding_window_pattern=6,
        ),
        999_885_952,
    ),
    "google/gemma-3-4b-pt": (GEMMA3_4B, None),
    "google/gemma-3-27b-it": (GEMMA3_27B, None),
    "Qwen/Qwen2.5-0.5B": (
        _qwen2(896, 4864, 24, 14, 2, 151_936, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen/Qwen2.5-7B": (
        _qwen2(3584, 18944, 28, 28, 4, 152_064, tie_word_embeddings=False),
        7_615_616_512,
    ),
    "Qwen/Qwen3-0.6B": (_qwen3(1024, 3072, 28, 16, 8, tied=True), 596_049_920),
    "Qwen/Qwen3-8B": (_qwen3(4096, 12288, 36, 32, 8, tied=False), 8_190_735_360),
    "microsoft/Phi-3-mini-4k-instruct": (
        _config(
            "phi3",
            3072,
            8192,
            32,
            32,
            32,
            32_064,
            4096,
            rms_norm_eps=1e-5,
            original_max_position_embeddings=4096,
            rope_theta=10000.0,
            rope_scaling=None,
            sliding_window=2047,
            tie_word_embeddings=False,
        ),
        3_821_079_552,
    ),
    "microsoft/Phi-4-mini-instruct": (
        _config(
            "phi3",
            3072,
            8192,
            32,
            24,
            8,
            200_064,
            131_072,
            rms_norm_eps=1e-5,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            rope_theta=10000.0,
            # the file has 48 divisors in each list, all 1.0 in the first
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.0 + i for i in range(48)],
            },
            sliding_window=262_144,
            tie_word_embeddings=True,
        ),
        3_836_021_760,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        _config(
            "smollm3",
            2048,
            11008,
            36,
            16,
            4,
            128_256,
            65_536,
            rope_theta=5e6,
            no_rope_layers=[1, 1, 1, 0] * 9,
            no_rope_layer_interval=4,
            layer_types=["full_attention"] * 36,
            use_sliding_window=False,
            sliding_window=None,
        ),
        3_075_098_624,
    ),
    "sail/Sailor-7B": (_qwen2(4096, 11008, 32, 32, 32, 151_936, tie_word_embeddings=False), None),
    "SeaLLMs/SeaLLM-7B-v2.5": (_gemma(3072, 24576, 28, 16, 16), 8_537_680_896),
    "SeaLLMs/SeaLLMs-v3-7B": (
        _qwen2(3584, 18944, 28, 28, 4, 152_064, tie_word_embeddings=False),
        7_615_616_512,
    ),
    "aisingapore/Llama-SEA-LION-v3-8B": (LLAMA31_8B, 8_030_261_248),
    "aisingapore/Gemma-SEA-LION-v3-9B": (GEMMA2_9B, 9_241_705_984),
    "aisingapore/Gemma-SEA-LION-v4-27B-IT": (GEMMA3_27B, None),
    "aisingapore/Qwen-SEA-LION-v4-32B-IT": (QWEN3_32B, 32_762_123_264),
}
