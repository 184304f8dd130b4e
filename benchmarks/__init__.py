"""How fast the workflow is, as ratios of two things timed in one run (`run`), and SDXL's shape on a GPU (`gpu`)."""
