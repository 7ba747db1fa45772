"""The key table between our parameter tree and Hugging Face folders and PEFT adapters, read in both
directions.

Our arrays keep the byte order of the file: heads are split out of a dimension and layers are
stacked in front, so every import and export of one layer is a reshape.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from crossin_jax.models.modules import OUTER, PROJECTIONS, Scale, fused_parts, layer_modules
from crossin_jax.models.spec import ModelSpec

# How PEFT ends the names of an adapter's parts.
ADAPTERS = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
PEFT_PREFIX = "base_model.model."

# Tensors that carry nothing: frequencies that config.json states.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# The text part of a multimodal Gemma 3, as it lies on the Hub and as transformers 5 writes it.
_TEXT_PARTS = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
)
_OTHER_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
)


# q_proj of Llama-2-7B, with 32 heads of width 128 and a model width of 4096:
#
#     path    layers/q_proj/weight                       shape         (32, 128, 4096)
#     name    model.layers.{}.self_attn.q_proj.weight    file_shape    (4096, 4096)
#
# The leaf in the state is a stack of 32 layers, (32, 32, 128, 4096), from 32 tensors of the file.
@dataclass(frozen=True, slots=True)
class Key:
    """One leaf of ours: `path` in the state, `name` in the file ({} stands for the layer), shapes
    of one layer.

    Of a fused weight the leaf has some rows only: for 4 query heads and 2 key/value heads of width
    8, k_proj has rows (32, 48) of the 64 of qkv_proj.
    """

    path: str
    name: str
    shape: tuple[int, ...]  # ours: heads split out
    file_shape: tuple[int, ...]  # of the whole tensor in the file
    rows: tuple[int, int] | None = None  # from and to, of a fused weight

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """The tensors that make up this leaf: one per layer, or one."""
        return (
            [self.name.format(layer) for layer in range(num_layers)]
            if self.stacked
            else [self.name]
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a projection lies in a file: the name, all rows of the weight there, and which of them
    are its own.
    """

    name: str
    total: int
    rows: tuple[int, int] | None


def _places(spec: ModelSpec) -> dict[str, _Place]:
    """The place of every projection of a layer."""
    # Rows of each weight in a file: its outputs, heads joined.
    heights = {
        name: math.prod(spec.sizes[letter] for letter in part.outputs)
        for name, part in PROJECTIONS.items()
    }
    places = {
        name: _Place(part.file_name, heights[name], None) for name, part in PROJECTIONS.items()
    }
    # The parts of a fused weight lie below one another:
    #     qkv_proj   rows 0 to N·H: q_proj · the next K·H: k_proj · the last K·H: v_proj
    for file_name, parts in fused_parts(spec).items():
        start, total = 0, sum(heights[name] for name in parts)
        for name in parts:
            places[name] = _Place(file_name, total, (start, start + heights[name]))
            start += heights[name]
    return places


def file_name(module: str, spec: ModelSpec) -> str:
    """The last part of a module's name in a Hugging Face folder: "qkv_proj" for q_proj where
    weights are fused.
    """
    place = _places(spec).get(module)
    return module if place is None else place.name.rsplit(".", 1)[-1]


def weight_keys(spec: ModelSpec) -> dict[str, Key]:
    """Every weight that a model of this spec has, by path."""
    sizes, keys = spec.sizes, []
    for module, (name, letters) in OUTER.items():
        if module != "lm_head" or not spec.tie_embeddings:
            shape = tuple(sizes[letter] for letter in letters)
            keys.append(Key(f"{module}/weight", f"{name}.weight", shape, shape))
    for module, place in _places(spec).items():
        part = PROJECTIONS[module]
        out, into = (
            tuple(sizes[letter] for letter in group) for group in (part.outputs, part.inputs)
        )
        path, name = f"layers/{module}", f"model.layers.{{}}.{place.name}"
        file_shape = (place.total, math.prod(into))
        keys.append(Key(f"{path}/weight", f"{name}.weight", (*out, *into), file_shape, place.rows))
        if part.bias is not None and getattr(spec, part.bias):
            keys.append(Key(f"{path}/bias", f"{name}.bias", out, (place.total,), place.rows))
    for module, part in layer_modules(spec):
        if isinstance(part, Scale):
            shape = (sizes[part.letter],)
            name = f"model.layers.{{}}.{part.file_name}.weight"
            keys.append(Key(f"layers/{module}/weight", name, shape, shape))
    return {key.path: key for key in keys}


def adapter_keys(
    spec: ModelSpec, targets: Iterable[str], rank: int, *, use_dora: bool = False
) -> dict[str, Key]:
    """The low-rank pairs (with DoRA: and magnitudes) of the target projections, under PEFT's names.

    The parts of a fused weight share its A. A shared parameter has the first of its paths in the
    alphabet.
    """
    # With fused weights A belongs to one of the parts; the others have a reference to it.
    owners = {part: min(parts) for parts in fused_parts(spec).values() for part in parts}
    keys = []
    for module, place in _places(spec).items():
        if module not in targets:
            continue
        part = PROJECTIONS[module]
        out, into = (
            tuple(spec.sizes[letter] for letter in group) for group in (part.outputs, part.inputs)
        )
        name = f"{PEFT_PREFIX}model.layers.{{}}.{place.name}."
        path, fan_in = f"layers/{module}/", math.prod(into)
        if owners.get(module, module) == module:
            keys.append(
                Key(path + "lora_a", name + ADAPTERS["lora_a"], (rank, *into), (rank, fan_in))
            )
        shape, file_shape = (*out, rank), (place.total, rank)
        keys.append(Key(path + "lora_b", name + ADAPTERS["lora_b"], shape, file_shape, place.rows))
        if use_dora:
            name += ADAPTERS["magnitude"]
            keys.append(Key(path + "magnitude", name, out, (place.total,), place.rows))
    return {key.path: key for key in keys}


def saved_keys(spec: ModelSpec, modules_to_save: Iterable[str]) -> dict[str, Key]:
    """The weights that PEFT stores whole beside an adapter; a module is named as in Hugging Face,
    e.g. `lm_head`.

    With tied embeddings `lm_head` and `embed_tokens` are one weight, which the file may hold under
    both names.
    """
    wanted = set(modules_to_save)
    if spec.tie_embeddings and "lm_head" in wanted:
        wanted.add("embed_tokens")
    return {
        path: replace(key, name=PEFT_PREFIX + key.name)
        for path, key in weight_keys(spec).items()
        if path.split("/")[-2] in wanted
    }


def canonical_name(name: str, spec: ModelSpec) -> str | None:
    """The name in the table of a tensor in a file; None for a tensor that a text model does not
    need.
    """
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
    # First the layers of each pattern, then runs of neighbouring layers as "0-31".
    layers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(r"\.layers\.(\d+)\.", name)
        pattern = name if found is None else name[: found.start(1)] + "{}" + name[found.end(1) :]
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
