"""Benchmarks: ratios of two times measured in one run (`run`), and SDXL's architecture on a GPU (`gpu`)."""
