"""How fast the workflow is, as ratios of two things timed in one run: `python -m benchmarks.run`, `python -m benchmarks.gpu`."""
