"""The study's tables, from its scores and the published rows. AR, ceilings and differences are in points (percent)."""
