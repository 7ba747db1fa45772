"""The modules of a decoder, each described once: what it computes, its name in files, and which
models have it.

Shape letters: B batch rows · T positions · V vocabulary · D model width · F feed-forward width ·
N query heads · K key/value heads · H head width · R LoRA rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Example: q_proj of Llama-2-7B. "BTD,NHD->BTNH" says that its weight has (N, H, D) = (32, 128,
# 4096) numbers, one row of D for each output. In a file it lies as
# model.layers.0.self_attn.q_proj.weight of shape (4096, 4096), which is the same order of bytes. An
# adapter of rank R has A of (R, D) and B of (N, H, R).


# How to read "BTNH,DNH->BTD" (o_proj): input BTNH, weight DNH, result BTD. A letter that input and
# weight share (N, H) is summed over. A letter of the weight alone (D) is an output. B and T pass
# through: the same product is computed for every token.
@dataclass(frozen=True, slots=True)
class Projection:
    """A product with a weight; it may carry a low-rank adapter."""

    equation: str  # inputs, weight -> outputs; the contractions of an adapter follow from it
    file_name: str  # within a layer of a Hugging Face folder
    bias: str | None = None  # the flag of the spec that adds a bias
    to_residual: bool = False  # its result is added to the residual stream

    @property
    def outputs(self) -> str:
        """The letters that the weight adds: "NH" for "BTD,NHD->BTNH"."""
        inputs, weight = self.equation.split("->")[0].split(",")
        return "".join(letter for letter in weight if letter not in inputs)

    @property
    def inputs(self) -> str:
        """The letters that the product contracts: "D" for "BTD,NHD->BTNH"."""
        return self.equation.split("->")[0].split(",")[1].removeprefix(self.outputs)


@dataclass(frozen=True, slots=True)
class Scale:
    """The weight of a norm."""

    file_name: str
    letter: str = "D"
    needs: str | None = None  # the flag of the spec that asks for it; None: every model has it
    axis: str = "norm"  # its logical axis, see parallel/mesh


# One layer, in the order in which its parameters are drawn: another order would start other models.
LAYER: dict[str, Projection | Scale] = {
    "input_layernorm": Scale("input_layernorm"),
    "q_proj": Projection("BTD,NHD->BTNH", "self_attn.q_proj", bias="qkv_bias"),
    "k_proj": Projection("BTD,KHD->BTKH", "self_attn.k_proj", bias="qkv_bias"),
    "v_proj": Projection("BTD,KHD->BTKH", "self_attn.v_proj", bias="qkv_bias"),
    "q_norm": Scale("self_attn.q_norm", "H", needs="qk_norm", axis="head"),
    "k_norm": Scale("self_attn.k_norm", "H", needs="qk_norm", axis="head"),
    "o_proj": Projection("BTNH,DNH->BTD", "self_attn.o_proj", to_residual=True),
    "post_attention_layernorm": Scale("post_attention_layernorm"),
    "pre_feedforward_layernorm": Scale("pre_feedforward_layernorm", needs="post_norms"),
    "post_feedforward_layernorm": Scale("post_feedforward_layernorm", needs="post_norms"),
    "gate_proj": Projection("BTD,FD->BTF", "mlp.gate_proj"),
    "up_proj": Projection("BTD,FD->BTF", "mlp.up_proj"),
    "down_proj": Projection("BTF,DF->BTD", "mlp.down_proj", to_residual=True),
}
# Outside the layers: (name in a Hugging Face folder, letters).
OUTER: dict[str, tuple[str, str]] = {
    "embed_tokens": ("model.embed_tokens", "VD"),
    "norm": ("model.norm", "D"),
    "lm_head": ("lm_head", "VD"),
}
# With `spec.fused_weights` a file holds these projections below one another, as one weight.
FUSED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
# The logical axis of each letter; parallel/mesh.py says which of them are sharded.
AXES = {"V": "vocab", "D": "embed", "F": "mlp", "N": "heads", "K": "kv_heads", "H": "head"}
PROJECTIONS = {name: part for name, part in LAYER.items() if isinstance(part, Projection)}
TARGETS = tuple(PROJECTIONS)  # what a low-rank adapter can be put on
# Results that a remat policy may keep; with all of them no product is computed twice.
KEPT = ("q", "k", "v", "attention", "output", "gate", "up", "down")


def layer_modules(spec: Any) -> Iterator[tuple[str, Projection | Scale]]:
    """The modules that a layer of this spec has, in the order of LAYER."""
    for name, part in LAYER.items():
        needs = part.needs if isinstance(part, Scale) else None
        if needs is None or getattr(spec, needs):
            yield name, part


def fused_parts(spec: Any) -> dict[str, tuple[str, ...]]:
    """FUSED for a model whose files hold fused weights, else nothing."""
    return FUSED if spec.fused_weights else {}
