"""Tests with SDXL-inpainting's architecture: a checkpoint of reduced width in the format of the hub's files, processed by the
same commands as the embedded study, and the full U-Net on the meta device.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conftest import PROJECT, run
from genseg.artifacts.manifest import read_manifest
from genseg.artifacts.predictions import read_predictions
from genseg.cli import main
from genseg.diffusion.pipeline import GSPipeline
from genseg.models import sdxl
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.backbone import load_text_encoders, load_unet, noise_schedule
from genseg.models.flops import meta_inputs, meta_unet
from genseg.models.text import encode_phrases
from genseg.models.unet import label_unet, run_unet

WIDTH = 32
UNET = sdxl.UNET | {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 2 * WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH + 6 * 8,
    "sample_size": 8,
}
# The published scheduler config also has keys that `EulerDiscreteScheduler` does not use.
SCHEDULER = sdxl.SCHEDULER | {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
VAE = sdxl.VAE | {"block_out_channels": [32, 32, 32, 32], "sample_size": 64}
DEFAULTS = {
    "unet": {
        "act_fn": "silu",
        "addition_embed_type_num_heads": 64,
        "center_input_sample": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "layers_per_block": 2,
        "mid_block_only_cross_attention": None,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    },
    "vae": {"act_fn": "silu", "force_upcast": True, "in_channels": 3, "norm_num_groups": 32, "out_channels": 3},
}
"""Published values that `sdxl` omits because they are defaults of diffusers."""
NARROW = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2, "projection_dim": WIDTH}
LETTERS = "abcdefghijklmnopqrstuvwxyz',.-"


def write_tokenizer(folder: Path, pad: str) -> int:
    """Write a byte-pair tokenizer in the format of CLIP's and return the size of its vocabulary.

    The vocabulary consists of letters, letters at the end of a word, merges, and the start and end tokens.
    """
    merges = ["t h", "th e</w>", "s t", "a r</w>", "st ar</w>"]
    words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: number for number, word in enumerate(["!", *words, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "CLIPTokenizer"}))
    return len(vocabulary)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A pipeline saved by diffusers; files that transformers 5 writes differently are replaced by the published format."""
    folder, tokenizers = tmp_path_factory.mktemp("sdxl"), tmp_path_factory.mktemp("tokenizers")
    sizes = [write_tokenizer(tokenizers / name, pad) for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!"))]
    torch.manual_seed(0)
    encoders = [
        cls(CLIPTextConfig(**config | NARROW | {"num_hidden_layers": layers, "vocab_size": size}))
        for cls, config, layers, size in (
            (CLIPTextModel, sdxl.TEXT_ENCODER, 2, sizes[0]),
            (CLIPTextModelWithProjection, sdxl.TEXT_ENCODER_2, 3, sizes[1]),
        )
    ]
    pipeline = StableDiffusionXLInpaintPipeline(
        vae=AutoencoderKL.from_config(VAE),
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tokenizers / "tokenizer_2"),
        unet=UNet2DConditionModel.from_config(UNET),
        scheduler=EulerDiscreteScheduler.from_config(SCHEDULER),
        force_zeros_for_empty_prompt=True,
    )
    pipeline.save_pretrained(folder)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(folder / name)
        shutil.copytree(tokenizers / name, folder / name)
    # The published files were written by transformers 4, which prefixes names of encoder weights with `text_model.`.
    for name in ("text_encoder", "text_encoder_2"):
        path = folder / name / "model.safetensors"
        state = {
            key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": value
            for key, value in load_file(path).items()
        }
        save_file(state, path, metadata={"format": "pt"})
    return folder


def test_checkpoint_has_the_published_configs(checkpoint):
    """Every key of the published configs exists and has the published value, except for the widths."""
    published = {"unet": DEFAULTS["unet"] | UNET, "vae": DEFAULTS["vae"] | VAE, "scheduler": SCHEDULER}
    for name, file in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        config = json.loads((checkpoint / name / file).read_text())
        for key, value in published[name].items():
            assert config[key] == value, (name, key)
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"


def test_text_encoders_load_all_weights_and_agree_with_diffusers(checkpoint):
    """All published weights are loaded, and embeddings of short and of truncated text equal those of SDXL's pipeline."""
    encoders = load_text_encoders(str(checkpoint))
    for model, name in zip(encoders.models, ("text_encoder", "text_encoder_2"), strict=True):
        stored = {
            key.removeprefix("text_model."): value for key, value in load_file(checkpoint / name / "model.safetensors").items()
        }
        loaded = {key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
        assert stored.keys() == {key for key in loaded if not key.endswith("position_ids")}
        assert all(torch.equal(loaded[key], value) for key, value in stored.items())
    stock = StableDiffusionXLInpaintPipeline.from_pretrained(checkpoint)
    for phrase in ("the star", "a cat's tail, and the star " * 9):
        tokens, _, pooled, _ = stock.encode_prompt(phrase, do_classifier_free_guidance=False)
        ours = encode_phrases(encoders, [phrase])[0]
        length = len(ours.tokens)
        assert torch.allclose(ours.tokens, tokens[0, :length], atol=1e-5)
        assert torch.allclose(ours.pooled, pooled[0], atol=1e-5)
    assert length == 77


@pytest.fixture
def study(checkpoint, tmp_path, monkeypatch) -> Path:
    """A small variant of the smoke study with this checkpoint as the backbone and very few steps."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((PROJECT / "params/smoke.yaml").read_text())
    params["study"] = "sdxl"
    params["data"]["scenes"] |= {"train_images": 12, "test_images": 4}
    params["backbone"] |= {"init": str(checkpoint), "shape": None, "vae": {"steps": 0}, "unet": {"steps": 0}}
    params["train"] |= {"steps": 2, "batch": 4, "micro_batch": 2, "validate_phrases": 2, "gradient_checkpointing": True}
    params["sample"] |= {
        "main": {"size": 64, "num_inference_steps": 1, "guidance_scale": 2.0},
        "base": {"size": 64, "num_inference_steps": 1, "guidance_scale": 7.5},
        "grid": {"sizes": [], "num_inference_steps": [], "guidance_scale": []},
    }
    (tmp_path / "sdxl.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def test_commands_train_save_load_and_predict_with_the_checkpoint(study, checkpoint):
    for command in (["data"], ["backbone"], ["latents"], ["train"], ["train", "--model", "discriminative"], ["sample"]):
        assert main([*command, "--params", "sdxl.yaml"]) == 0
    backbone = read_manifest("results/sdxl/backbone/manifest.json")
    assert backbone["pipeline"] == str(checkpoint)
    assert backbone["betas"] == noise_schedule(str(checkpoint))
    assert backbone["betas"]["beta_end"] == 0.012
    assert read_manifest("results/sdxl/latents/manifest.json")["vae_factor"] == 8

    model = GSPipeline.from_pretrained("results/sdxl/model/gs")
    assert (model.unet.config.in_channels, model.unet.config.out_channels) == (5, 1)
    assert model.unet.config.addition_embed_type == "text_time"
    assert set(model.adapter.project) == {"64"}, "both attention levels have width 64"
    original, stock = load_unet(str(checkpoint)), StableDiffusionXLInpaintPipeline.from_pretrained(checkpoint)
    is_trained = {
        name: not torch.equal(value, model.unet.state_dict()[name])
        for name, value in original.state_dict().items()
        if name in model.unet.state_dict() and value.shape == model.unet.state_dict()[name].shape
    }
    assert all(is_trained.values())
    for name in ("vae", "text_encoder", "text_encoder_2"):
        saved, pretrained = getattr(model, name).state_dict(), getattr(stock, name).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in pretrained.items()), name
    assert len(read_predictions("results/sdxl/predictions/main/predictions.parquet")) > 0

    picture = str(next(Path("data/sdxl/scenes/val2017").glob("*.jpg")))
    command = [
        "predict",
        picture,
        "--phrase",
        "the star",
        "--phrase",
        "a cat",
        "--model",
        "results/sdxl/model/gs",
        "--out",
        "out",
    ]
    assert main([*command, "--steps", "1", "--precision", "bf16"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"mask_0.png", "mask_1.png", "overlay.png", "predictions.json"}
    entries = json.loads(Path("out/predictions.json").read_text())
    assert [entry["phrase"] for entry in entries] == ["the star", "a cat"]
    assert np.asarray(Image.open("out/mask_0.png")).shape == (64, 64)


def test_offline_jobs_use_the_commit_of_the_hub_cache(study, checkpoint):
    """The hub's cache was filled on a login node; the jobs run without a network."""
    commit, hub = "0123456789abcdef" * 2 + "01234567", study / "hub/models--lab--tiny-sdxl"
    shutil.copytree(checkpoint, hub / "snapshots" / commit)
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text(commit)
    params = yaml.safe_load(Path("sdxl.yaml").read_text())
    params["backbone"]["init"] = "lab/tiny-sdxl"
    Path("sdxl.yaml").write_text(yaml.safe_dump(params))
    assert main(["data", "--params", "sdxl.yaml"]) == 0
    offline = {"HF_HUB_CACHE": str(study / "hub"), "HF_HUB_OFFLINE": "1"}
    completed = run("genseg", "backbone", "--params", "sdxl.yaml", cwd=study, **offline)
    assert f"using the cached commit {commit}" in completed.stdout
    manifest = read_manifest("results/sdxl/backbone/manifest.json")
    assert (manifest["pipeline"], manifest["revision"]) == ("lab/tiny-sdxl", commit)
    (hub / "refs/main").unlink()  # later jobs use the commit in the manifest, not the branch
    for command in (["latents"], ["train"], ["train", "--model", "discriminative"]):
        run("genseg", *command, "--params", "sdxl.yaml", cwd=study, **offline)
    assert GSPipeline.from_pretrained("results/sdxl/model/gs").unet.config.in_channels == 5
    params["backbone"]["init"] = "lab/another"
    Path("sdxl.yaml").write_text(yaml.safe_dump(params))
    failed = run("genseg", "backbone", "--params", "sdxl.yaml", cwd=study, check=False, **offline)
    assert failed.returncode == 2
    refusal = failed.stderr.strip().splitlines()[-1]
    assert refusal.startswith("genseg backbone: error: backbone.init: lab/another: cannot reach the hub")


@pytest.mark.parametrize("columns", ["masked_image", "latent"])
def test_gradients_reach_conv_in_adapter_and_null_embeddings(checkpoint, columns):
    torch.manual_seed(0)
    unet = label_unet(load_unet(str(checkpoint)), columns).requires_grad_(True)
    encoders = load_text_encoders(str(checkpoint))
    adapter = TextAdapter(2 * WIDTH, WIDTH, tuple(self_attention_widths(unet)))
    adapter.start_nulls_from(encode_phrases(encoders, [""])[0])
    unet.enable_gradient_checkpointing()
    unet.train()
    text = adapter(encode_phrases(encoders, ["the star", "a cat"]), torch.tensor([False, True]))
    run_unet(
        unet, torch.randn(2, 1, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), text, (64, 64)
    ).square().sum().backward()
    without_gradient = [
        name
        for name, parameter in [*unet.named_parameters(), *adapter.named_parameters()]
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert without_gradient == []
    for column in range(5):
        assert unet.conv_in.weight.grad[:, column].abs().sum() > 0, f"input channel {column}"


def test_full_size_unet_has_the_published_shapes_and_runs_on_meta_tensors():
    """The number of parameters, the converted convolutions, the adapter's widths and one evaluation at 1024 x 1024."""
    unet = meta_unet(sdxl.UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_478_084
    with torch.device("meta"):
        label_unet(unet, "masked_image")
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_478_084 - 4 * 320 * 9 - 3 * (320 * 9 + 1)
    assert (unet.conv_in.weight.shape, unet.conv_out.weight.shape) == ((320, 5, 3, 3), (1, 320, 3, 3))
    layers = [module.to_q.in_features for name, module in unet.named_modules() if name.endswith("attn1")]
    assert (len(layers), layers.count(640), layers.count(1280)) == (70, 10, 60)
    assert self_attention_widths(unet) == [640, 1280]
    inputs = meta_inputs(unet, latent=128, tokens=9, inject=True)
    assert inputs["text"].pooled.shape == (1, 1280)
    output = run_unet(unet, **inputs)
    assert output.shape == (1, 1, 128, 128)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())
