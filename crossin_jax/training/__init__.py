"""Training: state, step and optimizer, and what a run reports."""
