"""Networks: the frozen encoders of the backbone, and the label-diffusion U-Net derived from its U-Net."""
