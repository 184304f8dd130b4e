"""`GSPipeline` as diffusers users hold it: inputs, outputs, dtype, offload, files."""

import itertools
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from safetensors.torch import load_file

from genseg.diffusion.pipeline import GSPipeline
from genseg.models.adapter import TextAdapter
from genseg.models.text import encode_phrases
from genseg.models.vae import decode_latents, encode_images, image_tensor
from test_models import backbone, encoders, pipeline  # noqa: F401  (fixtures)

PHRASES = ["a star", "the grass", "two small red circles"]
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (64, 40, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quiet(pipeline):  # noqa: F811
    pipeline.set_progress_bar_config(disable=True)


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    return folder


def test_pictures_of_any_kind_are_the_same_picture(pipeline):  # noqa: F811
    expected = pipeline(Image.fromarray(PIXELS), PHRASES).maps
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for image in (
        PIXELS,
        PIXELS / 255,
        PIXELS.astype(np.float32) / 255,
        tensor,
        tensor / 255,
        Image.fromarray(PIXELS).convert("RGBA"),
    ):
        assert np.array_equal(pipeline(image, PHRASES).maps, expected)
    grey = Image.fromarray(PIXELS).convert("L")
    for image in (np.asarray(grey), np.asarray(grey)[..., None], torch.from_numpy(np.array(grey))[None], grey.convert("RGB")):
        assert np.array_equal(pipeline(image, PHRASES).maps, pipeline(grey, PHRASES).maps)


def test_a_list_of_images_is_each_of_them(pipeline):  # noqa: F811
    texts = [PHRASES, ["some water"]]
    together = pipeline([PIXELS, OTHER], texts, batch_size=3)
    for number, image in enumerate((PIXELS, OTHER)):
        alone = pipeline(image, texts[number])
        assert np.abs(together.maps[number] - alone.maps).max() < 1e-4
        assert together.masks[number].shape == (len(texts[number]), *image.shape[:2])
    batch = torch.from_numpy(np.stack([PIXELS, PIXELS])).permute(0, 3, 1, 2)
    assert len(pipeline(batch, [["a"], ["b"]]).masks) == 2
    assert np.array_equal(pipeline(PIXELS, "a star").maps, pipeline(PIXELS, ["a star"]).maps)


def test_an_image_is_encoded_once_and_progress_counts_the_steps(pipeline, monkeypatch):  # noqa: F811
    calls, bars = [], []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    progress_bar = pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **options: bars.append(progress_bar(**options)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False, file=open("/dev/null", "w"))  # noqa: SIM115
    pipeline(PIXELS, PHRASES * 2, num_inference_steps=3, batch_size=4)
    assert len(calls) == 1
    assert bars[0].n == bars[0].total == 2 * 3


def test_outputs(pipeline):  # noqa: F811
    output = pipeline(PIXELS, PHRASES, threshold=0.4)
    assert output.masks.dtype == bool
    assert output.masks.shape == (3, 50, 80)
    masks, maps = pipeline(PIXELS, PHRASES, threshold=0.4, return_dict=False)
    assert np.array_equal(masks, output.masks)
    assert np.array_equal(maps, output.maps)
    tensors = pipeline(PIXELS, PHRASES, threshold=0.4, output_type="pt")
    assert torch.equal(tensors.masks, torch.from_numpy(masks))
    assert torch.equal(tensors.maps, torch.from_numpy(maps))
    pictures = pipeline(PIXELS, PHRASES, threshold=0.4, output_type="pil").masks
    assert [picture.mode for picture in pictures] == ["L"] * 3
    assert np.array_equal(np.stack(pictures) == 255, masks)
    assert pipeline(PIXELS, PHRASES, threshold=0.0).masks.all()


def test_every_way_of_sampling_is_an_argument(pipeline, encoders, saved):  # noqa: F811
    texts = encode_phrases(encoders, PHRASES)
    latent = encode_images(pipeline.vae, image_tensor(Image.fromarray(PIXELS), 64)[None])
    keys = [("image", "predict", k) for k in range(len(PHRASES))]
    seen = [pipeline(PIXELS, PHRASES, 4, 2.0).maps]
    for rule, interval, ensemble in (("dpmpp", None, 1), ("ddpm", None, 1), ("ddim", (0.0, 0.6), 1), ("ddim", None, 2)):
        seen.append(pipeline(PIXELS, PHRASES, 4, 2.0, rule=rule, guidance_interval=interval, ensemble=ensemble).maps)
        expected = pipeline.label_maps(
            latent.repeat(3, 1, 1, 1), texts, keys, 64, 4, 2.0, rule=rule, interval=interval, ensemble=ensemble
        )
        assert np.array_equal(seen[-1], expected.numpy())
    clipped = GSPipeline.from_pretrained(saved)
    clipped.sample_by("trailing", True)
    seen.append(clipped(PIXELS, PHRASES, 4, 2.0).maps)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.combinations(seen, 2))


def test_generator_draws_the_seed(pipeline):  # noqa: F811
    first, again = (pipeline(PIXELS, PHRASES, generator=torch.Generator().manual_seed(7)).maps for _ in range(2))
    generator = torch.Generator().manual_seed(7)
    pipeline(PIXELS, PHRASES, generator=generator)
    later = pipeline(PIXELS, PHRASES, generator=generator).maps
    assert np.array_equal(first, again)
    assert np.abs(first - later).max() > 1e-3


def test_steps_and_guidance_default_to_the_checkpoints(pipeline, saved):  # noqa: F811
    own = GSPipeline.from_pretrained(saved)(PIXELS, PHRASES).maps
    assert np.array_equal(own, pipeline(PIXELS, PHRASES, num_inference_steps=2, guidance_scale=3.0).maps)
    assert not np.array_equal(own, pipeline(PIXELS, PHRASES, num_inference_steps=2, guidance_scale=1.0).maps)


def test_files_are_the_components(pipeline, saved):  # noqa: F811
    loaded = GSPipeline.from_pretrained(saved)
    for name, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            state = getattr(loaded, name).state_dict()
            assert all(torch.equal(state[key], value) for key, value in module.state_dict().items()), name
            assert state.keys() == module.state_dict().keys()
    assert load_file(saved / "adapter/diffusion_pytorch_model.safetensors").keys() == pipeline.adapter.state_dict().keys()
    assert {"null", "null_pooled", "null_injected.32"} <= pipeline.adapter.state_dict().keys()
    own = TextAdapter.from_pretrained(saved, subfolder="adapter")
    assert torch.equal(own.null, pipeline.adapter.null)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_bf16(saved, argument):
    whole = GSPipeline.from_pretrained(saved)
    half = GSPipeline.from_pretrained(saved, **{argument: torch.bfloat16})
    dtypes = {module.dtype for module in half.components.values() if isinstance(module, torch.nn.Module)}
    assert dtypes == {torch.bfloat16}
    expected, found = (item(PIXELS, PHRASES, guidance_scale=1.0).maps for item in (whole, half))
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).mean() < 0.03
    assert np.array_equal(whole.to(torch.bfloat16)(PIXELS, PHRASES, guidance_scale=1.0).maps, found)


def test_fp16_variant_is_saved_and_loaded(saved, tmp_path):
    half = GSPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "adapter/diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = GSPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(loaded.unet.parameters(), half.unet.parameters(), strict=True))
    assert torch.equal(loaded.adapter.null, half.adapter.null)


def test_a_vae_that_overflows_in_fp16_works_in_fp32(saved):
    vae = GSPipeline.from_pretrained(saved, dtype=torch.float16).vae
    with torch.no_grad():
        vae.encoder.conv_in.weight[0] = 60000  # activations beyond 65504 between layers, as SDXL's
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    vae32 = vae.__class__.from_config(vae.config)
    vae32.load_state_dict(vae.state_dict())
    expected = encode_images(vae32, images)
    assert torch.equal(encode_images(vae, images), expected)
    assert torch.equal(decode_latents(vae, expected), decode_latents(vae32, expected))
    assert torch.isfinite(expected).all()
    assert vae.dtype == torch.float16, "given back as it came"
    vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(encode_images(vae, images)).all(), "the test would see an overflow"


def test_model_offload_gives_the_same_masks(saved):
    """On the CPU, for want of an accelerator: the hooks are installed, run and take their models back."""
    expected = GSPipeline.from_pretrained(saved)(PIXELS, PHRASES).maps
    pipe = GSPipeline.from_pretrained(saved)
    pipe.enable_model_cpu_offload(device="cpu")
    hooked = {name for name, module in pipe.components.items() if hasattr(module, "_hf_hook")}
    assert hooked == {"text_encoder", "text_encoder_2", "vae", "unet"}
    order = pipe.model_cpu_offload_seq.split("->")
    assert set(order) == hooked
    for _ in range(2):
        assert np.array_equal(pipe(PIXELS, PHRASES).maps, expected)


def test_sequential_offload_gives_the_same_masks(saved):
    """Weights lie on the meta device until their layer is called. As `enable_sequential_cpu_offload` does it, but for its
    device, cpu:0, which accelerate takes for another one than cpu."""
    expected = GSPipeline.from_pretrained(saved)(PIXELS, PHRASES).maps
    pipe = GSPipeline.from_pretrained(saved)
    for name in set(pipe.components) - set(pipe._exclude_from_cpu_offload):
        if isinstance(module := getattr(pipe, name), torch.nn.Module):
            accelerate.cpu_offload(module, torch.device("cpu"))
    assert pipe.unet.conv_in.weight.is_meta
    for _ in range(2):
        assert np.array_equal(pipe(PIXELS, PHRASES).maps, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phrases": []}, "at least one"),
        ({"phrases": ["a", " "]}, "none may be empty"),
        ({"image": [PIXELS, PIXELS]}, "as many lists"),
        ({"image": [PIXELS], "phrases": ["a"]}, "as many lists"),
        ({"image": PIXELS.astype(np.float32)}, r"0\.\.1"),
        ({"image": torch.zeros(50, 80, 3)}, r"\[3, H, W\]"),
        ({"image": np.zeros((50, 80, 4), np.uint8)}, r"\[H, W, 3\]"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"guidance_scale": 0.5}, "at least 1"),
        ({"output_type": "latent"}, "np, pt or pil"),
        ({"rule": "euler"}, "must be one of ddim, ddpm, dpmpp"),
        ({"guidance_interval": (0.8, 0.2)}, "must ascend"),
        ({"ensemble": 0}, "ensemble must be at least 1"),
    ],
)
def test_wrong_arguments_are_told(pipeline, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": PIXELS, "phrases": PHRASES} | arguments)


def test_another_scheduler_is_refused_not_ignored(saved):
    pipe = GSPipeline.from_pretrained(saved)
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        pipe(PIXELS, PHRASES)


def test_an_answer_that_is_not_finite_is_told(saved):
    pipe = GSPipeline.from_pretrained(saved)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe(PIXELS, PHRASES)


def test_the_package_gives_the_pipeline_and_imports_torch_only_then():
    code = "import genseg, sys; assert 'torch' not in sys.modules; from genseg import GSPipeline; print(GSPipeline.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "GSPipeline", done.stderr
