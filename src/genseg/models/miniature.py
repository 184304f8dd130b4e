"""SDXL-inpainting in miniature: the same classes, wiring and files, with random weights, small enough for a laptop."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from genseg.params import BackboneShape

TIME_IDS = 6
"""Size conditioning of SDXL: original height and width, crop top and left, target height and width."""


def learn_tokenizer(captions: Iterable[str], vocabulary: int, pad_token: str) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer (lower case, `</w>` word ends, 77 tokens) learned from captions."""
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
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in model["merges"]]
    vocab = dict(model["vocab"])
    for letter in alphabet:  # every letter must be writable inside and at the end of a word, seen in training or not
        for token in (letter, letter + "</w>"):
            vocab.setdefault(token, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def build_miniature(shape: BackboneShape, size: int, captions: Iterable[str], seed: int) -> StableDiffusionXLInpaintPipeline:
    """A random pipeline of SDXL-inpainting's architecture at the given widths.

    The U-Net has SDXL's block types and 9 input channels (4 noisy latent, 1 mask, 4 masked image), `text_time`
    conditioning and linear projections; both text encoders contribute half of the cross-attention width.
    """
    torch.manual_seed(seed)
    captions = list(captions)
    tokenizers = [learn_tokenizer(captions, shape.vocabulary, pad) for pad in ("<|endoftext|>", "!")]
    common = {
        "vocab_size": len(tokenizers[0]),
        "hidden_size": shape.text_width,
        "intermediate_size": 4 * shape.text_width,
        "num_hidden_layers": shape.text_layers,
        "num_attention_heads": max(1, shape.text_width // 32),
        "max_position_embeddings": 77,
        "projection_dim": shape.text_width,
        "bos_token_id": tokenizers[0].bos_token_id,
        "eos_token_id": tokenizers[0].eos_token_id,
        "pad_token_id": tokenizers[0].pad_token_id,
    }
    levels = len(shape.unet_channels)
    vae_levels = len(shape.vae_channels)
    unet = UNet2DConditionModel(
        sample_size=size // 2 ** (vae_levels - 1),
        in_channels=9,
        out_channels=4,
        block_out_channels=tuple(shape.unet_channels),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (levels - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (levels - 1), "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=tuple(shape.transformer_layers),
        attention_head_dim=tuple(max(1, channels // shape.attention_head_channels) for channels in shape.unet_channels),
        cross_attention_dim=2 * shape.text_width,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=shape.text_width + TIME_IDS * 32,
        norm_num_groups=16,
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=tuple(shape.vae_channels),
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLInpaintPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(CLIPTextConfig(**common)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**common)),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=True,
    )
