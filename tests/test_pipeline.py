"""`GSPipeline` as diffusers users call it: inputs, outputs, dtype, offload, files."""

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
from genseg.params import OperatingPoint
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


def test_all_image_types_give_the_same_maps(pipeline):  # noqa: F811
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


def test_a_list_of_images_gives_the_masks_of_each_image(pipeline):  # noqa: F811
    texts = [PHRASES, ["some water"]]
    together = pipeline([PIXELS, OTHER], texts, batch_size=3)
    for number, image in enumerate((PIXELS, OTHER)):
        alone = pipeline(image, texts[number])
        assert np.abs(together.maps[number] - alone.maps).max() < 1e-4
        assert together.masks[number].shape == (len(texts[number]), *image.shape[:2])
    batch = torch.from_numpy(np.stack([PIXELS, PIXELS])).permute(0, 3, 1, 2)
    assert len(pipeline(batch, [["a"], ["b"]]).masks) == 2
    assert np.array_equal(pipeline(PIXELS, "a star").maps, pipeline(PIXELS, ["a star"]).maps)


def test_image_is_encoded_once_and_the_progress_bar_counts_steps(pipeline, monkeypatch):  # noqa: F811
    calls, bars = [], []
    encode = pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda *args, **kwargs: calls.append(1) or encode(*args, **kwargs))
    progress_bar = pipeline.progress_bar
    monkeypatch.setattr(pipeline, "progress_bar", lambda **options: bars.append(progress_bar(**options)) or bars[-1])
    pipeline.set_progress_bar_config(disable=False, file=open("/dev/null", "w"))  # noqa: SIM115
    pipeline(PIXELS, PHRASES * 2, num_inference_steps=3, batch_size=4)
    assert len(calls) == 1
    assert bars[0].n == bars[0].total == 2 * 3


def test_output_types_agree(pipeline):  # noqa: F811
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


def test_every_field_of_an_operating_point_is_an_argument(pipeline, encoders, saved):  # noqa: F811
    texts = encode_phrases(encoders, PHRASES)
    latent = encode_images(pipeline.vae, image_tensor(Image.fromarray(PIXELS), 64)[None])
    keys = [("image", "predict", k) for k in range(len(PHRASES))]
    outputs = [pipeline(PIXELS, PHRASES, 4, 2.0).maps]
    for options in ({"sampler": "dpmpp"}, {"sampler": "ddpm"}, {"guidance_interval": (0.0, 0.6)}, {"ensemble_size": 2}):
        outputs.append(pipeline(PIXELS, PHRASES, 4, 2.0, **options).maps)
        point = OperatingPoint(size=64, num_inference_steps=4, guidance_scale=2.0, **options)
        expected = pipeline.label_maps(latent.repeat(3, 1, 1, 1), texts, keys, point)
        assert np.array_equal(outputs[-1], expected.numpy())
    clipped = GSPipeline.from_pretrained(saved)
    clipped.configure_sampling("trailing", True)
    outputs.append(clipped(PIXELS, PHRASES, 4, 2.0).maps)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.combinations(outputs, 2))


def test_generator_determines_the_seed(pipeline):  # noqa: F811
    first, again = (pipeline(PIXELS, PHRASES, generator=torch.Generator().manual_seed(7)).maps for _ in range(2))
    generator = torch.Generator().manual_seed(7)
    pipeline(PIXELS, PHRASES, generator=generator)
    later = pipeline(PIXELS, PHRASES, generator=generator).maps
    assert np.array_equal(first, again)
    assert np.abs(first - later).max() > 1e-3


def test_steps_and_guidance_default_to_those_of_the_checkpoint(pipeline, saved):  # noqa: F811
    own = GSPipeline.from_pretrained(saved)(PIXELS, PHRASES).maps
    assert np.array_equal(own, pipeline(PIXELS, PHRASES, num_inference_steps=2, guidance_scale=3.0).maps)
    assert not np.array_equal(own, pipeline(PIXELS, PHRASES, num_inference_steps=2, guidance_scale=1.0).maps)


def test_saved_files_hold_all_components(pipeline, saved):  # noqa: F811
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
def test_bf16_gives_close_maps(saved, argument):
    whole = GSPipeline.from_pretrained(saved)
    half = GSPipeline.from_pretrained(saved, **{argument: torch.bfloat16})
    dtypes = {module.dtype for module in half.components.values() if isinstance(module, torch.nn.Module)}
    assert dtypes == {torch.bfloat16}
    expected, maps = (item(PIXELS, PHRASES, guidance_scale=1.0).maps for item in (whole, half))
    assert maps.dtype == np.float32
    assert 0 < np.abs(maps - expected).mean() < 0.03
    assert np.array_equal(whole.to(torch.bfloat16)(PIXELS, PHRASES, guidance_scale=1.0).maps, maps)


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
        vae.encoder.conv_in.weight[0] = 60000  # activations between layers exceed 65504, as in SDXL
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    vae32 = vae.__class__.from_config(vae.config)
    vae32.load_state_dict(vae.state_dict())
    expected = encode_images(vae32, images)
    assert torch.equal(encode_images(vae, images), expected)
    assert torch.equal(decode_latents(vae, expected), decode_latents(vae32, expected))
    assert torch.isfinite(expected).all()
    assert vae.dtype == torch.float16, "its dtype is restored"
    vae.register_to_config(force_upcast=False)
    assert not torch.isfinite(encode_images(vae, images)).all(), "without the upcast it overflows"


def test_model_offload_gives_the_same_masks(saved):
    """Runs on the CPU: the hooks are installed, move the models and move them back."""
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
    """Weights are on the meta device until their layer is called.

    This is `enable_sequential_cpu_offload` except for its device, cpu:0, which accelerate does not recognise as cpu.
    """
    expected = GSPipeline.from_pretrained(saved)(PIXELS, PHRASES).maps
    pipe = GSPipeline.from_pretrained(saved)
    for name in set(pipe.components) - set(pipe._exclude_from_cpu_offload):
        if isinstance(module := getattr(pipe, name), torch.nn.Module):
            accelerate.cpu_offload(module, torch.device("cpu"))
    assert pipe.unet.conv_in.weight.is_meta
    for _ in range(2):
        assert np.array_equal(pipe(PIXELS, PHRASES).maps, expected)


def test_callback_on_step_end_sees_each_step_and_may_replace_the_labels(pipeline):  # noqa: F811
    calls = []

    def record(pipe, step, timestep, callback_kwargs):
        calls.append((pipe, step, int(timestep), callback_kwargs["latents"].shape))
        return {}

    maps = pipeline(PIXELS, PHRASES, num_inference_steps=3, callback_on_step_end=record).maps
    assert np.array_equal(maps, pipeline(PIXELS, PHRASES, num_inference_steps=3).maps)
    assert [step for _, step, *_ in calls] == [0, 1, 2]
    assert calls[0][2] == 999
    assert {(pipe, tuple(shape)) for pipe, *_, shape in calls} == {(pipeline, (len(PHRASES), 1, *maps.shape[1:]))}

    def erase(pipe, step, timestep, callback_kwargs):
        return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    assert np.all(pipeline(PIXELS, PHRASES, num_inference_steps=3, callback_on_step_end=erase).maps == 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"phrases": []}, "at least one"),
        ({"phrases": ["a", " "]}, "no phrase may be empty"),
        ({"image": [PIXELS, PIXELS]}, "expected 2 lists of phrases"),
        ({"image": [PIXELS], "phrases": ["a"]}, "expected 1 lists of phrases"),
        ({"image": PIXELS.astype(np.float32)}, r"0\.\.1"),
        ({"image": torch.zeros(50, 80, 3)}, r"\[3, H, W\]"),
        ({"image": np.zeros((50, 80, 4), np.uint8)}, r"\[H, W, 3\]"),
        ({"num_inference_steps": 0}, r"num_inference_steps must be in 1\.\.1000"),
        ({"guidance_scale": 0.5}, "guidance_scale at least 1"),
        ({"output_type": "latent"}, "np, pt or pil"),
        ({"sampler": "euler"}, "must be one of ddim, ddpm, dpmpp, mean"),
        ({"guidance_interval": (0.8, 0.2)}, "must be ascending"),
        ({"ensemble_size": 0}, r"ensemble_size in 1\.\.99"),
        ({"callback_on_step_end_tensor_inputs": ["image_latents"]}, "must be in"),
    ],
)
def test_invalid_argument_is_rejected(pipeline, arguments, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": PIXELS, "phrases": PHRASES} | arguments)


def test_another_scheduler_is_rejected(saved):
    pipe = GSPipeline.from_pretrained(saved)
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        pipe(PIXELS, PHRASES)


def test_output_that_is_not_finite_is_rejected(saved):
    pipe = GSPipeline.from_pretrained(saved)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe(PIXELS, PHRASES)


def test_package_exports_the_pipeline_and_imports_torch_only_with_it():
    code = "import genseg, sys; assert 'torch' not in sys.modules; from genseg import GSPipeline; print(GSPipeline.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "GSPipeline", done.stderr
