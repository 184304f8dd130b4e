"""Refinement of inexact masks, predictions -> predictions: G4Seg (ours) and its controls."""
