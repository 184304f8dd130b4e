"""Refinement of inexact masks without training (G4Seg, ours): predictions in, predictions out."""
