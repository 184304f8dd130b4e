"""Params of the phase `backbone`: the pretrained pipeline that the study starts from."""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from genseg.params.base import ImageSize, Section


class BackboneShape(Section):
    """Shape of a miniature SDXL-inpainting pipeline with random weights."""

    unet_channels: list[PositiveInt]
    """Channels of the U-Net's levels."""
    transformer_layers: list[PositiveInt]
    """Transformer layers per block of the U-Net's levels."""
    attention_head_channels: PositiveInt
    """Channels of an attention head."""
    vae_channels: list[PositiveInt]
    """Channels of the VAE's levels. The down-sampling factor is 2 ** (levels - 1)."""
    text_width: PositiveInt
    """Width of the text encoders."""
    text_layers: PositiveInt
    """Layers of the text encoders."""
    vocabulary: PositiveInt
    """Maximum size of the byte-pair vocabulary, which is learned from the training captions."""


class BackboneTraining(Section):
    """Training of one component of the backbone on the study's training images."""

    steps: NonNegativeInt = 0
    """Optimiser steps; 0 leaves the weights unchanged."""
    batch: PositiveInt = 32
    """Batch size."""
    lr: PositiveFloat = 1e-3
    """Learning rate."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the arithmetic."""


class Backbone(Section):
    """Backbone: the pretrained pipeline that the study starts from."""

    init: str | None = "data/backbone"
    """Diffusers directory or hub id of an SDXL-inpainting pipeline; null: random weights of `shape`."""
    revision: str | None = None
    """Revision of the hub id."""
    shape: BackboneShape | None = None
    """Shape of a pipeline with random weights; null: the pipeline of `init`."""
    size: ImageSize = 128
    """Side in pixels of the images on which the backbone is trained and its VAE is measured."""
    vae: BackboneTraining = BackboneTraining()
    """Training of the VAE."""
    unet: BackboneTraining = BackboneTraining()
    """Training of the U-Net on text-to-image in-painting; text encoders with random weights are trained with it."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.init is None) == (self.shape is None):
            raise ValueError("exactly one of backbone.init and backbone.shape must be null")
        return self
