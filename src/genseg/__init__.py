"""Generative segmentation by label diffusion (GS) and generation-guided refinement (G4Seg), as one reproducible study."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import `GSPipeline`, and with it torch, on first access."""
    if name == "GSPipeline":
        from genseg.diffusion.pipeline import GSPipeline

        return GSPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
