"""Training: the miniature backbone, the label-diffusion model and its discriminative control."""
