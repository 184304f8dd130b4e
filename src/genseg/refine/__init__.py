"""Refinement: predictions -> predictions, and the controls that a refiner must beat."""
