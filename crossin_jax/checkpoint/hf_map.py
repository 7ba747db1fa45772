"""The key table between our parameter tree and Hugging Face folders and PEFT adapters, read in both directions.

Our arrays keep the byte order of the file: heads are split out of a dimension and layers are stacked in front, so every
import and export of one layer is a reshape.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from crossin_jax.models.spec import ModelSpec

# module: (name in a Hugging Face layer, output dimensions, input dimensions)
PROJECTIONS: dict[str, tuple[str, str, str]] = {
    "q_proj": ("self_attn.q_proj", "NH", "D"),
    "k_proj": ("self_attn.k_proj", "KH", "D"),
    "v_proj": ("self_attn.v_proj", "KH", "D"),
    "o_proj": ("self_attn.o_proj", "D", "NH"),
    "gate_proj": ("mlp.gate_proj", "F", "D"),
    "up_proj": ("mlp.up_proj", "F", "D"),
    "down_proj": ("mlp.down_proj", "D", "F"),
}
# module: (name in a Hugging Face layer, dimension, the spec's flag that asks for it)
NORMS: dict[str, tuple[str, str, str | None]] = {
    "input_layernorm": ("input_layernorm", "D", None),
    "post_attention_layernorm": ("post_attention_layernorm", "D", None),
    "pre_feedforward_layernorm": ("pre_feedforward_layernorm", "D", "post_norms"),
    "post_feedforward_layernorm": ("post_feedforward_layernorm", "D", "post_norms"),
    "q_norm": ("self_attn.q_norm", "H", "qk_norm"),
    "k_norm": ("self_attn.k_norm", "H", "qk_norm"),
}
# modules outside the layers: (Hugging Face name, dimensions)
OUTER: dict[str, tuple[str, str]] = {
    "embed_tokens": ("model.embed_tokens", "VD"), "norm": ("model.norm", "D"), "lm_head": ("lm_head", "VD")}
ADAPTERS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."

# tensors that carry nothing: frequencies that config.json states
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# the text part of a multimodal Gemma 3, as it lies on the Hub and as transformers 5 writes it
_TEXT_PARTS = (("language_model.lm_head.", "lm_head."), ("language_model.model.", "model."),
               ("model.language_model.", "model."))
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of ours: `path` in the state, `name` in the file ({} stands for the layer), shapes of one layer."""

    path: str
    name: str
    shape: tuple[int, ...]  # ours: heads split out
    file_shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """The tensors that make up this leaf: one per layer, or one."""
        return [self.name.format(layer) for layer in range(num_layers)] if self.stacked else [self.name]


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {"V": spec.vocab_size, "D": spec.width, "F": spec.ff_width, "N": spec.num_heads, "K": spec.num_kv_heads,
            "H": spec.head_width}


def weight_keys(spec: ModelSpec) -> dict[str, Key]:
    """Every weight that a model of this spec has, by path."""
    sizes, keys = _sizes(spec), []

    def add(path: str, name: str, *groups: str) -> None:
        shape = tuple(sizes[letter] for group in groups for letter in group)
        keys.append(Key(path, name, shape, tuple(math.prod(sizes[letter] for letter in group) for group in groups)))

    for module, (name, dims) in OUTER.items():
        if module != "lm_head" or not spec.tie_embeddings:
            add(f"{module}/weight", f"{name}.weight", *dims)
    for module, (name, out, into) in PROJECTIONS.items():
        add(f"layers/{module}/weight", f"model.layers.{{}}.{name}.weight", out, into)
        if spec.qkv_bias and module in ("q_proj", "k_proj", "v_proj"):
            add(f"layers/{module}/bias", f"model.layers.{{}}.{name}.bias", out)
    for module, (name, dim, flag) in NORMS.items():
        if flag is None or getattr(spec, flag):
            add(f"layers/{module}/weight", f"model.layers.{{}}.{name}.weight", dim)
    return {key.path: key for key in keys}


def adapter_keys(spec: ModelSpec, targets: Iterable[str], rank: int, *, use_dora: bool = False) -> dict[str, Key]:
    """The low-rank pairs (with DoRA: and magnitudes) of the target projections, under PEFT's names."""
    sizes, keys = _sizes(spec), []
    for module in PROJECTIONS:
        if module not in targets:
            continue
        name, *groups = PROJECTIONS[module]
        out, into = (tuple(sizes[letter] for letter in group) for group in groups)
        for leaf, shape, file_shape in (("lora_a", (rank, *into), (rank, math.prod(into))),
                                        ("lora_b", (*out, rank), (math.prod(out), rank)),
                                        ("magnitude", out, (math.prod(out),))):
            if leaf != "magnitude" or use_dora:
                keys.append(Key(f"layers/{module}/{leaf}", f"{PEFT_PREFIX}model.layers.{{}}.{name}.{ADAPTERS[leaf]}",
                                shape, file_shape))
    return {key.path: key for key in keys}


def saved_keys(spec: ModelSpec, modules_to_save: Iterable[str]) -> dict[str, Key]:
    """The weights that PEFT stores whole beside an adapter; a module is named as in Hugging Face, e.g. `lm_head`.

    With tied embeddings `lm_head` and `embed_tokens` are one weight, which the file may hold under both names.
    """
    wanted = set(modules_to_save)
    if spec.tie_embeddings and "lm_head" in wanted:
        wanted.add("embed_tokens")
    keys = {}
    for path, key in weight_keys(spec).items():
        module = key.name.rsplit(".", 1)[0]  # without .weight or .bias
        if module.rsplit(".", 1)[-1] in wanted:
            keys[path] = Key(path, PEFT_PREFIX + key.name, key.shape, key.file_shape)
    return keys


def canonical_name(name: str, spec: ModelSpec) -> str | None:
    """The name in the table of a tensor in a file; None for a tensor that a text model does not need."""
    if _IGNORED.search(name):
        return None
    if spec.model_type == "gemma3_text":
        if name.startswith(_OTHER_PARTS):
            return None
        for prefix, replacement in _TEXT_PARTS:
            if name.startswith(prefix):
                return replacement + name.removeprefix(prefix)
    return name


def summarize(names: Iterable[str]) -> list[str]:
    """Names with runs of layers folded: `model.layers.0-31.mlp.up_proj.weight`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name if found is None else name[:found.start(1)] + "{}" + name[found.end(1):]
        layers.setdefault(pattern, []).extend([int(found.group(1))] if found else [])
    folded = []
    for pattern, numbers in layers.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        folded.append(pattern.replace("{}", spans) if numbers else pattern)
    return folded
