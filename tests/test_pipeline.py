"""`GSPipeline` as diffusers users call it: inputs, outputs, dtype, offload, files."""

import inspect
import itertools
import subprocess
import sys

import accelerate
import numpy as np
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file

from genseg.artifacts.resample import bilinear
from genseg.diffusion.pipeline import GSPipeline
from genseg.diffusion.sampling import draw_noise, phrase_generators
from genseg.models.adapter import TextAdapter
from genseg.models.attention import InjectedAttnProcessor
from genseg.models.backbone import TextEncoders
from genseg.models.text import encode_phrases
from genseg.models.unet import run_unet
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
    masks, maps, uncertainty = pipeline(PIXELS, PHRASES, threshold=0.4, return_dict=False)
    assert uncertainty is None
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
        expected = pipeline.label_maps(latent.repeat(3, 1, 1, 1), texts, phrase_generators(0, keys, point), point).mean(0)
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

    def see_nothing(pipe, step, timestep, callback_kwargs):
        assert not callback_kwargs
        return {}

    options = {"callback_on_step_end": see_nothing, "callback_on_step_end_tensor_inputs": []}
    assert np.array_equal(maps, pipeline(PIXELS, PHRASES, num_inference_steps=3, **options).maps)

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
        ({"guidance_scale": 100}, "guidance_scale below 100"),
        ({"processing_resolution": 30}, "must be 0 or a multiple of 4"),
        ({"processing_resolution": -64}, "must be 0 or a multiple of 4"),
        ({"image": [PIXELS, OTHER], "phrases": [["a"], ["b"]], "processing_resolution": 0}, "differ in their larger side"),
        ({"output_uncertainty": True}, "needs an ensemble_size of at least 2"),
        ({"generator": [torch.Generator()]}, "expected a list of 3 phrases x ensemble_size 1 generators, got 1"),
        ({"latents": torch.zeros(1, 1, 16, 16)}, r"expected the shape \[3, 1, 16, 16\], got \[1, 1, 16, 16\]"),
        ({"latents": torch.zeros(3, 1, 16, 16), "generator": torch.Generator()}, "cannot be used together"),
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


def test_a_list_of_generators_equals_single_calls(pipeline):  # noqa: F811
    def generator(number):
        return torch.Generator().manual_seed(number)

    images, texts = [PIXELS, OTHER], [PHRASES[:2], PHRASES[2:]]
    output = pipeline(images, texts, ensemble_size=2, sampler="ddpm", generator=[generator(k) for k in range(6)])
    maps = np.concatenate(output.maps)
    for k, (image, phrase) in enumerate(zip((PIXELS, PIXELS, OTHER), PHRASES, strict=True)):
        single = [pipeline(image, phrase, sampler="ddpm", generator=generator(2 * k + member)).maps[0] for member in range(2)]
        assert np.allclose(maps[k], np.mean(single, 0), atol=1e-5)
        assert np.abs(single[0] - single[1]).max() > 1e-3


def test_uncertainty_is_the_standard_deviation_of_the_samples(pipeline):  # noqa: F811
    def generators():
        return [torch.Generator().manual_seed(number) for number in range(6)]

    output = pipeline(PIXELS, PHRASES[:2], ensemble_size=3, generator=generators(), output_uncertainty=True)
    singles = [pipeline(PIXELS, PHRASES[k // 3], generator=generators()[k]).maps[0] for k in range(6)]
    assert np.allclose(output.uncertainty, np.reshape(singles, (2, 3, *singles[0].shape)).std(1, ddof=1), atol=1e-5)
    lists = pipeline([PIXELS, OTHER], [["a"], ["b"]], ensemble_size=2, output_uncertainty=True, output_type="pt").uncertainty
    assert [tuple(item.shape) for item in lists] == [(1, 16, 16)] * 2


def test_latents_are_the_initial_noise(pipeline):  # noqa: F811
    point = OperatingPoint(size=64, num_inference_steps=2, guidance_scale=3.0, ensemble_size=2)
    rows = phrase_generators(5, [("image", "predict", k) for k in range(3)], point)
    noise = torch.cat([draw_noise(row, (1, 16, 16)) for row in rows])
    expected = pipeline(PIXELS, PHRASES, ensemble_size=2, seed=5).maps
    assert np.allclose(pipeline(PIXELS, PHRASES, ensemble_size=2, latents=noise, batch_size=2).maps, expected, atol=1e-5)
    assert np.abs(pipeline(PIXELS, PHRASES, ensemble_size=2, latents=-noise).maps - expected).max() > 1e-3


def test_guidance_scale_of_at_most_1_is_off(pipeline, monkeypatch):  # noqa: F811
    batches = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda x, *args, **kwargs: batches.append(len(x)) or forward(x, *args, **kwargs)
    )
    off = [pipeline(PIXELS, PHRASES, guidance_scale=scale).maps for scale in (1.0, 0.5, 0, -1)]
    assert all(np.array_equal(off[0], maps) for maps in off[1:])
    assert set(batches) == {3}, "one evaluation per phrase and step"
    assert not np.array_equal(off[0], pipeline(PIXELS, PHRASES, guidance_scale=1.5).maps)


def test_processing_resolution_and_size_of_the_masks(pipeline, saved):  # noqa: F811
    other = GSPipeline.from_pretrained(saved, default_processing_resolution=80)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(pipeline(PIXELS, PHRASES, processing_resolution=80).maps, other(PIXELS, PHRASES).maps)
    assert np.array_equal(pipeline(PIXELS, PHRASES, processing_resolution=0).maps, other(PIXELS, PHRASES).maps)  # 80 wide
    assert pipeline(PIXELS[:, :77], PHRASES, processing_resolution=0).maps.shape == (3, 20, 20), "rounded up to 80"
    output = pipeline(PIXELS, PHRASES, processing_resolution=32, match_input_resolution=False)
    assert np.array_equal(output.masks, bilinear(output.maps, 32, 32) >= 0.5)
    assert pipeline(PIXELS, PHRASES, processing_resolution=32).masks.shape == (3, 50, 80)


def stepped_by_hand(pipe, phrases, steps, scale):
    """Return the labels of a loop as in diffusers' pipelines, with the noise of seed 0."""
    models = TextEncoders((pipe.tokenizer, pipe.tokenizer_2), (pipe.text_encoder, pipe.text_encoder_2))
    latent = encode_images(pipe.vae, image_tensor(Image.fromarray(PIXELS), 64)[None]).repeat(len(phrases), 1, 1, 1)
    point = OperatingPoint(size=64, num_inference_steps=steps, guidance_scale=scale)
    rows = phrase_generators(0, [("image", "predict", k) for k in range(len(phrases))], point)
    generators = [row[0] for row in rows]
    pipe.scheduler.set_timesteps(steps)
    x = draw_noise(generators, (1, 16, 16)) * pipe.scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(pipe.scheduler.step).parameters
    with torch.no_grad():
        condition, null = pipe.adapter(encode_phrases(models, phrases)), pipe.adapter.unconditional(len(phrases))
        for t in pipe.scheduler.timesteps:
            sample = pipe.scheduler.scale_model_input(x, t)
            text, empty = (run_unet(pipe.unet, sample, latent, t, item, (64, 64)) for item in (condition, null))
            output = empty + scale * (text - empty)
            if pipe.scheduler.config.prediction_type == "sample":
                output = output * pipe.config.label_scale
            x = pipe.scheduler.step(output, t, x, **({"generator": generators} if takes_generator else {})).prev_sample
    return pipe.soft_labels(x).numpy()


SCHEDULERS = {
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M SDE": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": (UniPCMultistepScheduler, {}),
    "DEIS": (DEISMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "PNDM": (PNDMScheduler, {}),
}


@pytest.mark.parametrize(("scheduler", "options"), SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_schedulers_of_diffusers_sample_as_in_a_loop_by_hand(saved, scheduler, options, prediction_type):
    if prediction_type == "sample" and scheduler is PNDMScheduler:
        pytest.skip("PNDM does not support it")
    pipe = GSPipeline.from_pretrained(saved, prediction_type=prediction_type, label_scale=0.5)
    pipe.set_progress_bar_config(disable=True)
    betas = {"prediction_type": prediction_type, "rescale_betas_zero_snr": False, "timestep_spacing": "leading"}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **betas, **options)
    maps = [pipe(PIXELS, PHRASES, 6, 2.0, **batch).maps for batch in ({}, {"batch_size": 2})]
    assert np.allclose(maps[0], stepped_by_hand(pipe, PHRASES, 6, 2.0), atol=1e-4)
    assert np.allclose(*maps, atol=1e-3), "the scheduler starts afresh with each batch"
    assert maps[0].std() > 0.01


def test_own_dpmpp_agrees_with_the_scheduler_of_diffusers(saved):
    pipe = GSPipeline.from_pretrained(saved)
    ours = pipe(PIXELS, PHRASES, 100, 2.0, sampler="dpmpp").maps
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert np.abs(pipe(PIXELS, PHRASES, 100, 2.0).maps - ours).mean() < 0.01


def test_scheduler_that_does_not_fit_is_rejected(saved):
    pipe = GSPipeline.from_pretrained(saved)
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler: evaluates the network twice per step"):
        pipe(PIXELS, PHRASES)
    pipe.scheduler = UniPCMultistepScheduler()
    with pytest.raises(ValueError, match="'dpmpp': needs a DDIMScheduler, but the scheduler is UniPCMultistepScheduler"):
        pipe(PIXELS, PHRASES, sampler="dpmpp")


def test_attention_slicing_keeps_the_injected_text(saved):
    pipe = GSPipeline.from_pretrained(saved)
    with torch.no_grad():
        for linear in pipe.adapter.project.values():
            linear.weight.mul_(5)  # the text matters
    expected, calls = pipe(PIXELS, PHRASES).maps, []
    attend = InjectedAttnProcessor.attend
    with pytest.MonkeyPatch.context() as patch:
        record = staticmethod(lambda query, *rest: calls.append(query.shape[2]) or attend(query, *rest))
        patch.setattr(InjectedAttnProcessor, "attend", record)
        for size, heads in (("auto", {1}), ("max", {1}), (2, {1, 2}), (None, {2, 3})):
            pipe.enable_attention_slicing(size)
            calls.clear()
            assert np.allclose(pipe(PIXELS, PHRASES).maps, expected, atol=1e-5)
            assert set(calls) == heads
    for change in (lambda: pipe.unet.set_attention_slice(1), lambda: pipe.unet.set_attn_processor(AttnProcessor2_0())):
        change()
        with pytest.raises(ValueError, match=r"AttnProcessor.* would drop the injected text"):
            pipe(PIXELS, PHRASES)
        pipe.disable_attention_slicing()
        assert np.array_equal(pipe(PIXELS, PHRASES).maps, expected)


def test_output_that_is_not_finite_is_rejected(saved):
    pipe = GSPipeline.from_pretrained(saved)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        pipe(PIXELS, PHRASES)


def test_package_exports_the_pipeline_and_imports_torch_only_with_it():
    code = "import genseg, sys; assert 'torch' not in sys.modules; from genseg import GSPipeline; print(GSPipeline.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "GSPipeline", done.stderr
