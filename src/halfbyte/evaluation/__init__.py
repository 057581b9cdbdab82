"""Measuring what quantisation cost: divergence from the baseline."""
