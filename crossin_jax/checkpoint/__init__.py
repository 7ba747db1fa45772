"""Weights in and out: Orbax checkpoints of runs, Hugging Face folders, PEFT adapters."""
