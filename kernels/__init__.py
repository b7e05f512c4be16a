"""Sparse kernels: tensors in, tensors out. Knows no model; everything above it in dlpkit may import it, never the reverse."""
