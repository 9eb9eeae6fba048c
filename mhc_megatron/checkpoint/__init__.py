"""Checkpoints: which fit which settings, and continuing a residual checkpoint with mHC."""
