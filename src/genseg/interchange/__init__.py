"""Other people's outputs: read once into predictions, and predictions written in formats that other tools read."""
