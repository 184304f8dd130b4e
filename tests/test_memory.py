"""Planned memory compared with closed forms and with the memory of the same computation on the CPU."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import PROJECT
from genseg.artifacts import masks
from genseg.baselines.attend import METHODS, ImageAttention
from genseg.baselines.captions import Query
from genseg.models import sdxl, stable_diffusion
from genseg.models.flops import meta_inputs, meta_unet
from genseg.models.memory import LiveBytes, activation_bytes, decoding_bytes, generator_bytes
from genseg.models.miniature import learn_tokenizer
from genseg.models.text_to_image import TextToImage
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, vae_factor
from genseg.params import load_params
from genseg.params.baselines import Inversion
from genseg.plan.generator import Generator, attention_bytes, refinement_bytes
from genseg.refine.g4seg import refine_predictions

SMOKE = load_params(PROJECT / "params/smoke.yaml")
REFINE, BASELINES = SMOKE.refine, SMOKE.baselines
SENSITIVE = ("controls", "alpha", "beta", "timestep", "iterations", "layer")
NARROW = sdxl.UNET | {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 16,
    "transformer_layers_per_block": [1, 1, 2],
}


@pytest.fixture(autouse=True)
def deterministic_algorithms():
    """Use deterministic algorithms as jobs do, because some operations then need more memory, also on the meta device."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_of_a_chain_equal_the_closed_form(device):
    """Three linear layers, each followed by a sigmoid: the backward pass needs only the output of each sigmoid."""
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8, bias=False), nn.Sigmoid())]).to(device)
    x = torch.empty(4, 8, device=device)
    row = 4 * 8 * 4
    with LiveBytes([x, *model.parameters()]) as live:
        output = model(x)
        assert live.now == 3 * row
        assert live.peak == 4 * row, "the last sigmoid needs its input and its output"
        del output
        assert live.now == 0
    with LiveBytes([x, *model.parameters()]) as live, torch.no_grad():
        model(x)
    assert live.peak == 2 * row


def test_activation_bytes_equal_the_peak_on_the_cpu():
    planned = activation_bytes(NARROW, 8, 3, True, 2, "fp32", training=False)
    unet = meta_unet(NARROW).to_empty(device="cpu").requires_grad_(False)
    inputs = meta_inputs(unet, 8, 3, True, 2)
    text = inputs["text"]
    text.tokens, text.pooled = (torch.zeros_like(item, device="cpu") for item in (text.tokens, text.pooled))
    text.injected = {width: torch.zeros_like(item, device="cpu") for width, item in text.injected.items()}
    inputs |= {name: torch.zeros_like(inputs[name], device="cpu") for name in ("x_t", "image_latent", "timestep")}
    with LiveBytes([*unet.parameters(), *unet.buffers()]) as live, torch.no_grad():
        run_unet(unet, **inputs)
    assert live.peak == pytest.approx(planned, rel=0.05), "except for buffers of the kernels"


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_16_bits():
    def planned(batch, **options):
        return activation_bytes(NARROW, 8, 3, True, batch, **{"precision": "fp32", **options})

    assert planned(4) - planned(2) == pytest.approx(planned(6) - planned(4), rel=0.01), "linear"
    assert planned(8, checkpointing=True) < 0.5 * planned(8)
    assert 0.5 * planned(8) < planned(8, precision="bf16") < planned(8)
    assert planned(8, training=False) < 0.2 * planned(8)
    assert planned(8, training=False, precision="bf16") == pytest.approx(0.5 * planned(8, training=False), rel=0.1)


def test_meta_unet_of_sd21_has_the_published_attention_layers():
    unet = meta_unet(stable_diffusion.CONFIGS[stable_diffusion.SD_21]["unet"])
    layers: dict[str, list[tuple[int, int, int]]] = {"attn1": [], "attn2": []}  # (heads, queries, keys) in forward order

    def record(module, arguments, options, kind):
        queries, context = arguments[0].shape[1], options.get("encoder_hidden_states")
        layers[kind].append((module.heads, queries, queries if context is None else context.shape[1]))

    for name, module in unet.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(partial(record, kind=name.rpartition(".")[2]), with_kwargs=True)
    with torch.no_grad():
        run_unet(unet, **meta_inputs(unet, latent=64, tokens=77, inject=False))
    down = [(5, 4096)] * 2 + [(10, 1024)] * 2 + [(20, 256)] * 2
    expected = [*down, (20, 64), *[(20, 256)] * 3, *[(10, 1024)] * 3, *[(5, 4096)] * 3]
    assert layers["attn1"] == [(heads, queries, queries) for heads, queries in expected]
    assert layers["attn2"] == [(heads, queries, 77) for heads, queries in expected]


# ----------------------------------------------------------------------------------- a pretrained text-to-image model
TINY = {
    "in_channels": 4,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": [2, 4],
    "sample_size": 16,
}
TINY_VAE = sdxl.VAE | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
}
TINY_TEXT = sdxl.TEXT_ENCODER | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE = 32


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Configs and model of a miniature Stable Diffusion with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    tokenizer = learn_tokenizer(["a red circle near the grass"], 120, "<|endoftext|>")
    text = TINY_TEXT | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    UNet2DConditionModel.from_config(TINY).save_pretrained(folder / "unet")
    AutoencoderKL.from_config(TINY_VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig(**text)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    configs = {"unet": TINY, "vae": TINY_VAE, "text_encoder": text}
    return Generator(configs, "tiny"), TextToImage(str(folder), None, torch.device("cpu"))


def track_memory(model: TextToImage) -> LiveBytes:
    """Track live bytes, not counting the weights of the model."""
    modules = [model.unet, model.vae, *model.text_encoders]
    return LiveBytes([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])


@pytest.mark.parametrize("hub_id", stable_diffusion.CONFIGS)
def test_published_configs_have_the_published_number_of_parameters(hub_id):
    published = {
        stable_diffusion.SD_14: 859_520_964 + 83_653_863 + 123_060_480,
        stable_diffusion.SD_15: 859_520_964 + 83_653_863 + 123_060_480,
        stable_diffusion.SD_21: 865_910_724 + 83_653_863 + 340_387_840,
    }
    assert Generator(stable_diffusion.CONFIGS[hub_id], hub_id).parameters == published[hub_id]


@pytest.mark.parametrize(
    ("changes", "area"),
    [
        ({"feature_size": 8}, "injected forward pass"),
        ({"feature_size": 24}, "distances"),
        ({"feature_size": 24, "batch": 1, "cut_quantiles": []}, "evidence"),
        ({"feature_size": 8, "alpha": 0.0}, "stock forward passes"),
        ({"feature_size": 16, "timesteps": [50, 100, 200], "iterations": 3, "layers": [0, 1]}, "features"),
        ({"feature_size": 8, "inject": ["cross"]}, "only cross-attention"),
        ({"feature_size": 24, "generation": 0.0, "cut_quantiles": []}, "only matching"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refinement_uses_the_planned_memory(pipeline, tmp_path, changes, area):
    generator, model = pipeline
    no_variants = {"controls": [], "sensitivity": REFINE.sensitivity.model_copy(update={name: [] for name in SENSITIVE})}
    settings = {"size": SIZE, "batch": 3, "layers": [0], "iterations": 2, "precision": "fp32", **no_variants, **changes}
    refine = REFINE.model_copy(update=settings)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:20, 6:24] = True
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / "1.png")
    rows = pd.DataFrame({"image_id": 1, "narrative_id": "n", "phrase_id": range(refine.batch)})
    phrases = rows.assign(file_name=str(tmp_path / "1.png"), phrase="red circle", height=SIZE, width=SIZE)
    with track_memory(model) as live:
        refine_predictions(phrases, rows.assign(score=1.0, mask=masks.encode(mask)), model, refine, 0)
    assert refinement_bytes(refine, generator) == pytest.approx(live.peak, rel=0.05), area


@pytest.mark.parametrize("texts", [3, 8])
@pytest.mark.parametrize(
    "inversion", [None, {"steps": 2, "guidance_scale": 7.5, "inner_steps": 1, "lr": 0.01, "tolerance": 1e-9}]
)
def test_attention_baselines_use_the_planned_memory(pipeline, texts, inversion):
    generator, model = pipeline
    diffpng = BASELINES.diffpng.model_copy(update={"inversion": inversion and Inversion(**inversion), "self_side": 16})
    methods = {"diffpng": diffpng, "diffseg": BASELINES.diffseg.model_copy(update={"sides": [16, 8]})}
    params = BASELINES.model_copy(update={"size": SIZE, "batch": 3, "precision": "fp32", **methods})
    names = [f"{'a ' * k}red circle" for k in range(texts)]
    queries = [Query(name, name, 0, len(name)) for name in names]
    with track_memory(model) as live:
        latent = model.encode(torch.zeros(1, 3, SIZE, SIZE))
        image = ImageAttention(model, params, latent, (SIZE, SIZE), queries, (0, 1))
        for method in METHODS.values():
            method.maps(image, queries, False)
    assert attention_bytes(params, generator, texts) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("gradient", [False, True])
def test_generator_bytes_equal_the_peak_on_the_cpu(pipeline, gradient):
    _, model = pipeline
    sample, tokens = torch.zeros(4, 4, 16, 16), torch.zeros(4, 77, 32, requires_grad=gradient)
    with track_memory(model) as live, torch.set_grad_enabled(gradient):
        output = model.predict(sample, 5, sample[:1], tokens, tokens)
        if gradient:
            torch.autograd.grad(output.square().mean(), tokens)
    assert generator_bytes(TINY, 16, 77, 4, "fp32", gradient=gradient) == pytest.approx(live.peak, rel=0.1)


def test_decoding_in_parts_limits_memory_and_gives_the_same_images(monkeypatch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, **blocks).eval()
    latents = torch.randn(5, 4, 8, 8)
    whole, size = decode_latents(vae, latents), 8 * vae_factor(vae)
    one, five = (decoding_bytes(vae.config, size, batch, "fp32") for batch in (1, 5))
    assert five == pytest.approx(5 * one, rel=0.1)
    monkeypatch.setattr("genseg.models.vae.DECODED_PIXELS", size**2)
    assert torch.allclose(decode_latents(vae, latents), whole, atol=1e-5)
    images = 5 * 3 * size**2 * 4  # bytes of the decoded parts, and again of their concatenation
    assert one < decoding_bytes(vae.config, size, 5, "fp32") <= one + 2 * images
    assert decoding_bytes(vae.config, size, 5, "fp16") == decoding_bytes(vae.config, size, 5, "fp32")
