"""Benchmarks, how a model is asked, what its answers mean, and scores with intervals."""
