"""The study's figures, one per module: each draws a PNG and returns its caption."""
