"""Planned memory against closed forms and against what the same pass holds on the CPU."""

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from conftest import PROJECT
from genseg.artifacts import masks
from genseg.baselines.attend import METHODS, Attended
from genseg.models import sdxl, stable_diffusion
from genseg.models.flops import meta_inputs, meta_unet
from genseg.models.memory import LiveBytes, activation_bytes, attention_maps, decoding_bytes, generator_bytes
from genseg.models.miniature import learn_tokenizer
from genseg.models.text_to_image import TextToImage
from genseg.models.unet import run_unet
from genseg.models.vae import decode_latents, vae_factor
from genseg.params import Inversion, load_params
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
def as_jobs_do():
    """Jobs ask for deterministic algorithms, and some operations then hold more off the CPU: on the meta device, too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_of_a_chain(device):
    """Three linear layers with a sigmoid after each: the backward pass needs each sigmoid's output and nothing else."""
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(8, 8, bias=False), nn.Sigmoid())]).to(device)
    x = torch.empty(4, 8, device=device)
    row = 4 * 8 * 4
    with LiveBytes([x, *model.parameters()]) as live:
        output = model(x)
        assert live.now == 3 * row
        assert live.peak == 4 * row, "while the last sigmoid reads the last product"
        del output
        assert live.now == 0
    with LiveBytes([x, *model.parameters()]) as live, torch.no_grad():
        model(x)
    assert live.peak == 2 * row


def test_what_is_counted_without_memory_is_what_is_held_on_the_cpu():
    wanted = activation_bytes(NARROW, 8, 3, True, 2, "fp32", training=False)
    unet = meta_unet(NARROW).to_empty(device="cpu").requires_grad_(False)
    inputs = meta_inputs(unet, 8, 3, True, 2)
    text = inputs["text"]
    text.tokens, text.pooled = (torch.zeros_like(item, device="cpu") for item in (text.tokens, text.pooled))
    text.injected = {width: torch.zeros_like(item, device="cpu") for width, item in text.injected.items()}
    inputs |= {name: torch.zeros_like(inputs[name], device="cpu") for name in ("x_t", "image_latent", "timestep")}
    with LiveBytes([*unet.parameters(), *unet.buffers()]) as live, torch.no_grad():
        run_unet(unet, **inputs)
    assert live.peak == pytest.approx(wanted, rel=0.05), "but for the kernels' own buffers"


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_16_bits():
    def needed(batch, **options):
        return activation_bytes(NARROW, 8, 3, True, batch, **{"precision": "fp32", **options})

    assert needed(4) - needed(2) == pytest.approx(needed(6) - needed(4), rel=0.01), "linear"
    assert needed(8, checkpointing=True) < 0.5 * needed(8)
    assert 0.5 * needed(8) < needed(8, precision="bf16") < needed(8)
    assert needed(8, training=False) < 0.2 * needed(8)
    assert needed(8, training=False, precision="bf16") == pytest.approx(0.5 * needed(8, training=False), rel=0.1)


def test_attention_maps_of_sd21_at_512():
    maps = attention_maps(stable_diffusion.CONFIGS[stable_diffusion.SD_21]["unet"], latent=64, tokens=77)
    found = [(item.heads, item.queries) for item in maps if item.is_self]
    down = [(5, 4096)] * 2 + [(10, 1024)] * 2 + [(20, 256)] * 2
    assert found == [*down, (20, 64), *[(20, 256)] * 3, *[(10, 1024)] * 3, *[(5, 4096)] * 3]
    cross = [item for item in maps if not item.is_self]
    assert [(item.heads, item.queries) for item in cross] == found
    assert {item.keys for item in cross} == {77}
    assert all(item.keys == item.queries for item in maps if item.is_self)


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
    """A Stable Diffusion in miniature with random weights: its configs, its model."""
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


def held(model: TextToImage) -> LiveBytes:
    modules = [model.unet, model.vae, *model.text_encoders]
    return LiveBytes([tensor for module in modules for tensor in (*module.parameters(), *module.buffers())])


@pytest.mark.parametrize("hub_id", stable_diffusion.CONFIGS)
def test_published_configs_have_the_published_parameters(hub_id):
    published = {
        stable_diffusion.SD_15: 859_520_964 + 83_653_863 + 123_060_480,
        stable_diffusion.SD_21: 865_910_724 + 83_653_863 + 340_387_840,
    }
    assert Generator(stable_diffusion.CONFIGS[hub_id], hub_id).parameters == published[hub_id]


@pytest.mark.parametrize(
    ("changes", "area"),
    [
        ({"grid": 8}, "an injected pass"),
        ({"grid": 24}, "distances"),
        ({"grid": 24, "batch": 1, "levels": []}, "evidence"),
        ({"grid": 8, "alpha": 0.0}, "stock passes"),
        ({"grid": 16, "timesteps": [50, 100, 200], "iterations": 3, "layers": [0, 1]}, "features"),
        ({"grid": 8, "inject": ["cross"]}, "cross-attention alone"),
        ({"grid": 24, "generation": 0.0, "levels": []}, "matching alone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refinement_holds_what_is_planned(pipeline, tmp_path, changes, area):
    generator, model = pipeline
    none = {"controls": [], "sensitivity": REFINE.sensitivity.model_copy(update={name: [] for name in SENSITIVE})}
    asked = {"size": SIZE, "batch": 3, "layers": [0], "iterations": 2, "precision": "fp32", **none, **changes}
    refine = REFINE.model_copy(update=asked)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:20, 6:24] = True
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / "1.png")
    rows = pd.DataFrame({"image_id": 1, "narrative_id": "n", "phrase_id": range(refine.batch)})
    phrases = rows.assign(file_name=str(tmp_path / "1.png"), phrase="red circle", height=SIZE, width=SIZE)
    with held(model) as live:
        refine_predictions(phrases, rows.assign(score=1.0, mask=masks.encode(mask)), model, refine, 0)
    assert refinement_bytes(refine, generator) == pytest.approx(live.peak, rel=0.05), area


@pytest.mark.parametrize("texts", [3, 8])
@pytest.mark.parametrize("inversion", [None, {"steps": 2, "guidance": 7.5, "inner_steps": 1, "lr": 0.01, "tolerance": 1e-9}])
def test_the_attention_baselines_hold_what_is_planned(pipeline, texts, inversion):
    generator, model = pipeline
    diffpng = BASELINES.diffpng.model_copy(update={"inversion": inversion and Inversion(**inversion), "self_side": 16})
    params = BASELINES.model_copy(update={"size": SIZE, "batch": 3, "precision": "fp32", "diffpng": diffpng})
    names = [f"{'a ' * k}red circle" for k in range(texts)]
    with held(model) as live:
        latent = model.encode(torch.zeros(1, 3, SIZE, SIZE))
        image = Attended(model, params, latent, (SIZE, SIZE), names, (0, 1))
        for method in METHODS.values():
            method.maps(image, names, False)
    assert attention_bytes(params, generator, texts) == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_pass_of_the_generator_holds_what_is_counted_without_memory(pipeline, gradient):
    _, model = pipeline
    sample, tokens = torch.zeros(4, 4, 16, 16), torch.zeros(4, 77, 32, requires_grad=gradient)
    with held(model) as live, torch.set_grad_enabled(gradient):
        answer = model.predict(sample, 5, sample[:1], tokens, tokens)
        if gradient:
            torch.autograd.grad(answer.square().mean(), tokens)
    assert generator_bytes(TINY, 16, 77, 4, "fp32", gradient=gradient) == pytest.approx(live.peak, rel=0.1)


def test_decoding_some_images_at_a_time_bounds_its_memory_and_changes_nothing(monkeypatch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(32, 32), latent_channels=4, **blocks).eval()
    latents = torch.randn(5, 4, 8, 8)
    together, size = decode_latents(vae, latents), 8 * vae_factor(vae)
    one, five = (decoding_bytes(vae.config, size, batch, "fp32") for batch in (1, 5))
    assert five == pytest.approx(5 * one, rel=0.1)
    monkeypatch.setattr("genseg.models.vae.DECODED_PIXELS", size**2)
    assert torch.allclose(decode_latents(vae, latents), together, atol=1e-5)
    images = 5 * 3 * size**2 * 4  # of the parts, and of the batch that they become
    assert one < decoding_bytes(vae.config, size, 5, "fp32") <= one + 2 * images
    assert decoding_bytes(vae.config, size, 5, "fp16") == decoding_bytes(vae.config, size, 5, "fp32")
