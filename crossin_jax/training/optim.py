"""The optimizer as an optax chain, from settings and parameter names."""

from typing import Any

import jax
import optax

from crossin_jax.config import Optim


def make_schedule(optim: Optim, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup_share`, then the named decay to `final_share` of the peak."""
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
    # starts above zero: a first step of learning rate 0 would be a batch thrown away
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, decay], [warmup_steps])


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies to the parameter at a tree path: not to norms, biases and DoRA magnitudes."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return names[-1] not in ("bias", "magnitude") and not any("norm" in name for name in names)


def make_optimizer(optim: Optim, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then the named optimizer with decoupled weight decay on matrices only."""
    schedule = make_schedule(optim, num_steps)

    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)

    decay = {"weight_decay": optim.weight_decay, "mask": mask}
    rule = {
        "adamw": lambda: optax.adamw(schedule, optim.b1, optim.b2, mu_dtype=optim.moments_dtype, **decay),
        "lion": lambda: optax.lion(schedule, optim.b1, optim.b2, mu_dtype=optim.moments_dtype, **decay),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(optim.weight_decay, mask), optax.scale_by_learning_rate(schedule)),
    }[optim.name]()
    return optax.chain(optax.clip_by_global_norm(optim.clip_norm), rule) if optim.clip_norm else rule
