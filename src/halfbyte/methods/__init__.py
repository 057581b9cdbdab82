"""Quantisation methods: pure functions from a weight, a statistic and a scheme to codes and scales. One paper a file."""
