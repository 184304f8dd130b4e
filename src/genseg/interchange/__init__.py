"""Outputs of other methods read as predictions, and predictions written in formats that other tools read."""
