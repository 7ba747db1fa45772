"""The TPU compiler for tests, where it is installed."""

import functools

import pytest

from crossin_jax.plan.topology import Topology, open_topology


@functools.cache
def topology(name: str) -> Topology:
    """An absent slice; skips the test where there is no TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    return open_topology(name)
