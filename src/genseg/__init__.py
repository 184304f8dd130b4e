"""Generative segmentation by label diffusion (GS) and generation-guided refinement (G4Seg), as one reproducible study."""

__version__ = "0.1.0"
