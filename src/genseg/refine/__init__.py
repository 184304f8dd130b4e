"""Refinement of inexact masks: predictions -> predictions, by G4Seg (ours) and by the controls that it must beat."""
