"""Sums of products by an accumulator: the reference that defines them, the kernels, and which of them runs."""
