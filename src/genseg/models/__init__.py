"""The networks: the frozen encoders of the backbone, and the label-diffusion U-Net made from its U-Net."""
