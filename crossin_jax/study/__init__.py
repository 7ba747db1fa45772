"""Run a whole study: train and evaluate every cell, skip what is done, write one report."""
