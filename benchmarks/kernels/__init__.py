"""The cases of bench_kernels.py, one module per op."""
