"""The five artifact types that pass between rooms, each with one reader, one writer, one schema and a version.

phrase table (`phrases`), latents (`latents`), model (a diffusers directory, `genseg.models`), predictions
(`predictions`) and scores (`scores`); `manifest` describes what a phase made of what. Every write is atomic (`files`).
"""
