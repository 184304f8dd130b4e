"""Methods that GS is compared with, and coarse masks that a refiner is given. Every one emits predictions.

`registry` lists them all; importing it needs no torch.
"""
