"""Small things that several tests build."""

from crossin_jax.config import Architecture


def small_architecture(**changes) -> Architecture:
    """A two-layer Llama with grouped queries; every width divides over eight devices."""
    return Architecture(**{"width": 32, "ff_width": 48, "num_layers": 2, "num_heads": 8, "num_kv_heads": 2, "max_length": 64,
                           "vocab_size": 300} | changes)
