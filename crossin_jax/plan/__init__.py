"""Compile a run for TPUs that this machine lacks: does it fit, and at what cost?"""
