"""The five artifact types that phases exchange, each with one reader, one writer, one schema and a version.

phrase table (`phrases`), latents (`latents`), model (a diffusers directory, `genseg.models`), predictions
(`predictions`) and scores (`scores`). `manifest` records the inputs and outputs of a phase. All writes are atomic (`files`).
"""
