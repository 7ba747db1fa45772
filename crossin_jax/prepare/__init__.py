"""Prepare data: everything between a parallel data set and a training run."""
