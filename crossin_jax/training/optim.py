"""The optimizer as an optax chain, from settings and parameter names.

Shape letters: L layers · D model width · N query heads · H head width · R LoRA rank.
"""

import dataclasses
import fnmatch
from functools import partial
from typing import Any

import jax
import optax
import optax.contrib

from crossin_jax.config import Optim, UserError, hint
from crossin_jax.parallel.mesh import leaf_name

# Parameters with one number per output, whatever the shape of the outputs: (N, H) for q_proj/bias.
VECTORS = ("bias", "magnitude")


# 100 steps with warmup_share .1, final_share .1 and a peak of 1, by step from 0:
#
#     steps 0 to 9      0.1, 0.2 … 1.0     the warm-up
#     steps 10 to 99    1.0 … 0.1          the decay; with "constant" it stays at 1.0
def make_schedule(optim: Optim, num_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a decay to `final_share` of the peak."""
    warmup_steps = round(optim.warmup_share * num_steps)
    peak, final = optim.learning_rate, optim.learning_rate * optim.final_share
    decay_steps = max(1, num_steps - warmup_steps)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=optim.final_share),
        "linear": lambda: optax.linear_schedule(peak, final, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[optim.schedule]()
    if not warmup_steps:
        return decay
    # The warm-up starts above zero: a first step with learning rate 0 would waste a batch.
    # With 4 warm-up steps and peak 1, the steps have 0.25, 0.5, 0.75, 1.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to a parameter: not to norms, biases and DoRA magnitudes."""
    names = leaf_name(path).split("/")
    return names[-1] not in VECTORS and not any("norm" in name for name in names)


def matrix_dimensions(
    path: tuple[Any, ...], leaf: Any
) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions of a projection are inputs and outputs; None for what Muon leaves to Adam.

    Muon makes the update of a matrix orthogonal. Our projections have more than two dimensions, and
    the first one is the layer:

        q_proj/weight  L,N,H,D: inputs D, outputs N,H
        q_proj/lora_a  L,R,D:   inputs D, outputs R
        o_proj/weight  L,D,N,H: inputs N,H, outputs D
        o_proj/lora_a  L,R,N,H: inputs N,H, outputs R
    """
    names = leaf_name(path).split("/")
    # embeddings, norms and the output head; q_proj/bias is (L, N, H), which is not a matrix
    if names[0] != "layers" or names[-1] in VECTORS or leaf.ndim < 3:
        return None
    if names[1] == "o_proj" and names[-1] in ("weight", "lora_a"):
        return optax.contrib.MuonDimensionNumbers(tuple(range(2, leaf.ndim)), (1,))
    return optax.contrib.MuonDimensionNumbers((leaf.ndim - 1,), tuple(range(1, leaf.ndim - 1)))


def label_groups(patterns: tuple[str, ...], params: Any) -> Any:
    """The first pattern that matches each parameter, "" if none does.

    A pattern without a parameter of its own is a `UserError`: it may be misspelt.
    """

    def label(path: tuple[Any, ...], _: Any) -> str:
        return next((p for p in patterns if fnmatch.fnmatchcase(leaf_name(path), p)), "")

    labels = jax.tree_util.tree_map_with_path(label, params)
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for pattern in set(patterns) - set(jax.tree.leaves(labels)):
        raise UserError(
            f"optim.groups[{pattern!r}] names no trained parameter beside those of earlier groups"
            f"{hint(pattern, names)}; there are {', '.join(names[:6])} …"
        )
    return labels


def make_optimizer(optim: Optim, num_steps: int) -> optax.GradientTransformation:
    """Clipping over all parameters, then the named optimizer; groups have their rate and decay."""
    rule = make_rule(optim, num_steps)
    if optim.groups:
        rules = {
            pattern: make_rule(optim, num_steps, **values)
            for pattern, values in optim.groups.items()
        }
        rule = optax.partition({"": rule} | rules, partial(label_groups, tuple(optim.groups)))
    if not optim.clip_norm:
        return rule
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), rule)


def make_rule(
    optim: Optim, num_steps: int, *, rate: float = 1.0, weight_decay: float | None = None
) -> optax.GradientTransformation:
    """The named optimizer at `rate` times its learning rate, with decoupled decay of matrices."""
    weight_decay = optim.weight_decay if weight_decay is None else weight_decay
    schedule = make_schedule(
        dataclasses.replace(optim, learning_rate=optim.learning_rate * rate), num_steps
    )

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)

    # An entry per name of optim.name; config.py lists the names.
    options = {"mu_dtype": optim.moments_dtype, "weight_decay": weight_decay, "mask": mask}
    last = optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(schedule)
    return {
        "adamw": lambda: optax.adamw(schedule, optim.b1, optim.b2, **options),
        "lion": lambda: optax.lion(schedule, optim.b1, optim.b2, **options),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *last
        ),
        "muon": lambda: optax.chain(
            optax.contrib.muon(
                -1.0,
                mu_dtype=optim.moments_dtype,
                adam_b1=optim.b1,
                adam_b2=optim.b2,
                # Updates have the size of AdamW's, so that its learning rates fit.
                consistent_rms=0.2,
                muon_weight_dimension_numbers=partial(
                    jax.tree_util.tree_map_with_path, matrix_dimensions
                ),
            ),
            # Muon's own decay would leave out the parameters that it gives to Adam.
            *last,
        ),
    }[optim.name]()
