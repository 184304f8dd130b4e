"""A miniature of SDXL-inpainting: the same classes, architecture and files, with small widths and random weights."""

import json
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.models import sdxl
from genseg.params.backbone import BackboneShape


def learn_tokenizer(captions: Iterable[str], vocabulary: int, pad_token: str) -> CLIPTokenizer:
    """Train a CLIP byte-pair tokenizer (lower case, `</w>` at word ends) with at most `vocabulary` tokens on captions.

    SDXL's two tokenizers differ in `pad_token`.
    """
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}, merges=[])
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted("!,.'-0123456789abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|startoftext|>", "<|endoftext|>", "!", *(f"{letter}</w>" for letter in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(sorted(captions), trainer)
    model = json.loads(learner.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    # Add every letter as a token, within a word and at its end, even if the captions do not contain it.
    for letter in alphabet:
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def build_miniature(shape: BackboneShape, size: int, captions: Iterable[str], seed: int) -> StableDiffusionXLInpaintPipeline:
    """Build a pipeline for images of `size` x `size` pixels, with random weights and tokenizers trained on captions."""
    torch.manual_seed(seed)
    captions = list(captions)  # both tokenizers iterate over it
    tokenizers = [learn_tokenizer(captions, shape.vocabulary, pad) for pad in ("<|endoftext|>", "!")]
    text_config = _text_config(shape, tokenizers[0])
    unet, vae = _build_unet(shape, size), _build_vae(shape, size)  # the random weights depend on this order
    return StableDiffusionXLInpaintPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text_config)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(**sdxl.SCHEDULER),
        force_zeros_for_empty_prompt=True,
    )


def _build_unet(shape: BackboneShape, size: int) -> UNet2DConditionModel:
    """Build an in-painting U-Net with SDXL's block types, linear projections and `text_time` conditioning."""
    levels = len(shape.unet_channels)
    return UNet2DConditionModel(
        sample_size=size // 2 ** (len(shape.vae_channels) - 1),
        in_channels=9,
        out_channels=4,
        block_out_channels=tuple(shape.unet_channels),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=tuple(shape.transformer_layers),
        attention_head_dim=tuple(max(1, channels // shape.attention_head_channels) for channels in shape.unet_channels),
        cross_attention_dim=2 * shape.text_width,  # hidden states of both text encoders
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=shape.text_width + 6 * 32,  # 6 size values (`added_conditions`)
        norm_num_groups=16,
    )


def _build_vae(shape: BackboneShape, size: int) -> AutoencoderKL:
    levels = len(shape.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=tuple(shape.vae_channels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def _text_config(shape: BackboneShape, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": max(1, shape.text_width // 32),
        "max_position_embeddings": 77,
        "projection_dim": shape.text_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
