"""Tests of the networks: the paper's equations, initialisation, encoding, determinism, loading and saving."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from genseg.diffusion.objectives import make_scheduler
from genseg.diffusion.pipeline import TAIL, GSPipeline, soften
from genseg.diffusion.sampling import phrase_generators
from genseg.errors import UserError
from genseg.models.adapter import TextAdapter
from genseg.models.attention import InjectedAttnProcessor, _explicit_attention, self_attention_widths
from genseg.models.backbone import TextEncoders, load_component, load_unet
from genseg.models.device import choose_device, run_deterministically
from genseg.models.miniature import build_miniature
from genseg.models.text import encode_phrases
from genseg.models.unet import label_unet, run_unet
from genseg.models.vae import decode_latents, encode_images, encode_masks, image_tensor, vae_factor
from genseg.params import OperatingPoint
from genseg.params.backbone import BackboneShape

SHAPE = BackboneShape(
    unet_channels=[16, 32, 48],
    transformer_layers=[1, 1, 1],
    attention_head_channels=16,
    vae_channels=[8, 16, 16],
    text_width=32,
    text_layers=2,
    vocabulary=120,
)
CAPTIONS = ["two small red circles near the grass", "a large striped blue star", "some water"]
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def backbone():
    pipeline = build_miniature(SHAPE, 64, CAPTIONS, seed=0)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipeline


@pytest.fixture(scope="module")
def encoders(backbone):
    return TextEncoders((backbone.tokenizer, backbone.tokenizer_2), (backbone.text_encoder, backbone.text_encoder_2))


@pytest.fixture(scope="module")
def pipeline(backbone, encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbone")
    backbone.unet.save_pretrained(folder / "unet")
    torch.manual_seed(1)
    unet = label_unet(load_unet(str(folder)), "masked_image")
    adapter = TextAdapter(2 * SHAPE.text_width, SHAPE.text_width, tuple(self_attention_widths(unet)))
    adapter.start_nulls_from(encode_phrases(encoders, [""])[0])
    return GSPipeline(
        vae=backbone.vae,
        text_encoder=backbone.text_encoder,
        text_encoder_2=backbone.text_encoder_2,
        tokenizer=backbone.tokenizer,
        tokenizer_2=backbone.tokenizer_2,
        unet=unet,
        adapter=adapter.eval(),
        scheduler=make_scheduler(BETAS, "v_prediction", zero_terminal_snr=True),
        default_processing_resolution=64,
        default_denoising_steps=2,
        default_guidance_scale=3.0,
    )


@pytest.mark.parametrize(("tokens", "injected"), [(16, 5), (1, 1), (9, 77)])
def test_injected_attention_equals_equations_3_to_5(tokens, injected):
    torch.manual_seed(0)
    attn = Attention(query_dim=32, heads=4, dim_head=8).double()
    x, p = torch.randn(2, tokens, 32, dtype=torch.float64), torch.randn(2, injected, 32, dtype=torch.float64)
    joint = torch.cat([x, p], dim=1)  # Eq. 3
    q, k, v = (f(joint).view(2, -1, 4, 8).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
    z = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v  # Eq. 4
    z = attn.to_out[0](z.transpose(1, 2).reshape(2, -1, 32))
    literal = z[:, :tokens]  # Eq. 5
    attn.set_processor(InjectedAttnProcessor())
    assert torch.allclose(attn(x, injected={32: p}), literal, rtol=0, atol=1e-14)
    assert not torch.allclose(attn(x), literal, atol=1e-3), "injection changes the output"


def test_padded_text_gives_the_same_attention_as_unpadded_text():
    torch.manual_seed(0)
    attn = Attention(query_dim=32, cross_attention_dim=24, heads=4, dim_head=8, processor=InjectedAttnProcessor()).double()
    self_attn = Attention(query_dim=32, heads=4, dim_head=8, processor=InjectedAttnProcessor()).double()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    text, extra = torch.randn(1, 4, 24, dtype=torch.float64), torch.randn(1, 4, 32, dtype=torch.float64)
    padded_text = torch.cat([text, torch.full((1, 3, 24), 7.0, dtype=torch.float64)], 1)
    padded_extra = torch.cat([extra, torch.full((1, 3, 32), 7.0, dtype=torch.float64)], 1)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    assert torch.allclose(attn(x, padded_text, text_mask=mask), attn(x, text), atol=1e-12)
    assert torch.allclose(
        self_attn(x, injected={32: padded_extra}, text_mask=mask), self_attn(x, injected={32: extra}), atol=1e-12
    )


@pytest.mark.parametrize("padded", [False, True])
def test_explicit_attention_in_bf16_equals_scaled_dot_product_attention(padded):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, n, 2, 16) for n in (9, 7, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [4]]))[:, None, None] if padded else None
    by_head = (part.transpose(1, 2) for part in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(*by_head, mask).transpose(1, 2)
    rounded = _explicit_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), expected, atol=0.03), "three roundings, each of 2^-8"
    exact = _explicit_attention(query.double(), key.double(), value.double(), mask)
    assert torch.allclose(exact.float(), expected, atol=1e-6)


def test_processor_without_injection_equals_the_stock_processor(backbone):
    unet, size = backbone.unet, 16
    inputs = (torch.randn(2, 9, size, size), torch.tensor([10, 900]), torch.randn(2, 7, 64))
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.zeros(2, 6)}
    stock = unet(*inputs, added_cond_kwargs=added).sample
    before = unet.attn_processors
    unet.set_attn_processor(InjectedAttnProcessor())
    ours = unet(*inputs, added_cond_kwargs=added).sample
    unet.set_attn_processor(before)
    assert torch.allclose(stock, ours, atol=1e-5)


@pytest.mark.parametrize(("columns", "image"), [("masked_image", slice(5, 9)), ("latent", slice(0, 4))])
def test_label_unet_keeps_the_selected_input_channels(backbone, tmp_path, columns, image):
    backbone.unet.save_pretrained(tmp_path / "unet")
    original = load_unet(str(tmp_path))
    unet = label_unet(load_unet(str(tmp_path)), columns)
    assert torch.equal(unet.conv_in.weight[:, 1:], original.conv_in.weight[:, image])
    assert torch.equal(unet.conv_in.weight[:, :1], original.conv_in.weight[:, 4:5])
    assert torch.equal(unet.conv_in.bias, original.conv_in.bias)
    assert (unet.config.in_channels, unet.config.out_channels) == (5, 1)
    with pytest.raises(UserError, match="9"):
        label_unet(unet, "latent")


def test_label_unet_for_latent_labels_keeps_latent_channels_and_output(backbone, tmp_path):
    backbone.unet.save_pretrained(tmp_path / "unet")
    original = load_unet(str(tmp_path))
    unet = label_unet(load_unet(str(tmp_path)), "masked_image", label_channels=4)
    assert torch.equal(unet.conv_in.weight[:, :4], original.conv_in.weight[:, :4])
    assert torch.equal(unet.conv_in.weight[:, 4:], original.conv_in.weight[:, 5:9])
    assert torch.equal(unet.conv_out.weight, original.conv_out.weight)
    assert torch.equal(unet.conv_out.bias, original.conv_out.bias)
    assert (unet.config.in_channels, unet.config.out_channels) == (8, 4)


def test_dropout_replaces_all_text_inputs_together(encoders):
    torch.manual_seed(0)
    adapter = TextAdapter(64, 32, (32, 48))
    texts = encode_phrases(encoders, ["a large striped blue star", "water"])
    adapter.start_nulls_from(encode_phrases(encoders, [""])[0])
    mixed = adapter(texts, torch.tensor([True, False]))
    null = adapter.unconditional(1)
    conditional = adapter(texts[1:])
    null_length = mixed.mask[0].sum()
    assert null_length == null.tokens.shape[1]
    assert torch.equal(mixed.tokens[0, :null_length], null.tokens[0])
    assert torch.equal(mixed.pooled[0], null.pooled[0])
    length = conditional.tokens.shape[1]
    for width in (32, 48):
        assert torch.equal(mixed.injected[width][0, :null_length], null.injected[width][0])
        assert torch.allclose(mixed.injected[width][1, :length], conditional.injected[width][0], atol=1e-6)
    assert torch.equal(mixed.tokens[1, :length], conditional.tokens[0])


@pytest.mark.parametrize("text", ["tokens", "pooled"])
def test_gradients_reach_new_layers_and_null_embeddings(pipeline, encoders, text):
    unet = pipeline.unet
    adapter = TextAdapter(64, 32, tuple(self_attention_widths(unet)), text=text, null_tokens=2 if text == "tokens" else 1)
    unet.requires_grad_(True)
    condition = adapter(encode_phrases(encoders, ["some water", "a star"]), torch.tensor([True, False]))
    run_unet(
        unet, torch.randn(2, 1, 16, 16), torch.randn(2, 4, 16, 16), torch.tensor([5, 7]), condition, (64, 64)
    ).sum().backward()
    for name, parameter in [*adapter.named_parameters(), *unet.conv_in.named_parameters(), *unet.conv_out.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    unet.requires_grad_(False)
    unet.zero_grad(set_to_none=True)


def test_text_embedding_does_not_depend_on_the_batch(encoders):
    alone = encode_phrases(encoders, ["a star"])[0]
    batched = encode_phrases(encoders, ["two small red circles near the grass", "a star", "some water"])[1]
    assert torch.allclose(alone.tokens, batched.tokens, atol=1e-5)
    assert torch.allclose(alone.pooled, batched.pooled, atol=1e-5)
    assert alone.tokens.shape == (4, 64), "start, a, star, end, and no padding"
    assert not alone.truncated


def test_long_text_is_truncated_and_marked(encoders):
    embedding = encode_phrases(encoders, ["red " * 200])[0]
    assert embedding.truncated
    assert embedding.tokens.shape[0] == 77


def test_tokenizer_encodes_any_lower_case_word(backbone):
    tokenizer = backbone.tokenizer
    ids = tokenizer("the zebra's 3 jackdaws, quizzed!").input_ids
    assert tokenizer.eos_token_id not in ids[1:-1], "no unknown token"


def test_saved_and_loaded_pipeline_is_bit_equal(pipeline, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 80, 3), dtype=np.uint8))
    phrases = ["a star", "the grass", "two small red circles"]
    before = pipeline(image, phrases)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = GSPipeline.from_pretrained(tmp_path / "model")
    after = loaded(image, phrases)
    assert np.array_equal(before.maps, after.maps)
    assert before.masks.shape == (3, 50, 80)
    assert before.maps.shape == (3, 16, 16)
    assert before.maps.min() >= 0
    assert before.maps.max() <= 1
    assert isinstance(loaded.adapter, TextAdapter)


def test_maps_do_not_depend_on_the_batch(pipeline):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    phrases = ["a star", "the grass", "two small red circles near the grass", "some water"]
    batched, single = pipeline(image, phrases, batch_size=4), pipeline(image, phrases, batch_size=1)
    assert np.abs(batched.maps - single.maps).max() < 1e-4
    other_seed = pipeline(image, phrases, seed=1)
    assert np.abs(batched.maps - other_seed.maps).max() > 1e-3, "another seed gives other maps"


def test_decoding_inverts_the_scaling_of_latents(backbone):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = encode_images(backbone.vae, images)
    assert latents.shape == (2, 4, 8, 8)
    assert vae_factor(backbone.vae) == 4
    raw = backbone.vae.decode(latents / backbone.vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.equal(decode_latents(backbone.vae, latents), raw)


def test_image_tensor_maps_white_to_one():
    white = image_tensor(Image.new("RGB", (30, 20), "white"), 16)
    assert white.shape == (3, 16, 16)
    assert torch.equal(white, torch.ones(3, 16, 16))


def test_cuda_without_a_gpu_raises_an_error():
    if torch.cuda.is_available():
        assert choose_device("cuda").type == "cuda"
    else:
        with pytest.raises(UserError, match="cuda"):
            choose_device("cuda")
    assert choose_device("cpu").type == "cpu"


def test_operation_without_a_deterministic_implementation_is_retried_with_one_warning(capsys):
    """`put_` has no deterministic implementation on any device."""

    def put():
        return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([5.0]))[1].item()

    try:
        choose_device("cpu", exact=True)
        assert run_deterministically(lambda: 7) == 7
        with pytest.raises(RuntimeError, match="deterministic"):
            put()
        assert capsys.readouterr().out == ""
        assert run_deterministically(put) == 5
        assert "put_ does not have a deterministic implementation" in capsys.readouterr().out
        assert run_deterministically(put) == put() == 5
        assert capsys.readouterr().out == "", "only the first call warns"
        with pytest.raises(RuntimeError, match="another"):
            run_deterministically(lambda: (_ for _ in ()).throw(RuntimeError("another")))
    finally:
        choose_device("cpu")


def test_missing_or_unreadable_backbone_raises_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no such directory"):
        load_unet(str(tmp_path / "nowhere"))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot load"):
        load_unet(str(tmp_path))
    with pytest.raises(UserError, match=r"missing folder vae"):
        load_component(type(None), str(tmp_path), "vae", None)


def test_ensemble_is_the_mean_of_samples_including_the_single_sample(pipeline):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    encoders = TextEncoders((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
    texts = encode_phrases(encoders, ["the grass", "two stars"])
    keys = [(1, "n", 0), (1, "n", 1)]

    def maps(ensemble, chosen=slice(None)):
        point = OperatingPoint(size=64, num_inference_steps=2, guidance_scale=3.0, ensemble_size=ensemble)
        return pipeline.label_maps(latents[chosen], texts[chosen], phrase_generators(3, keys[chosen], point), point).mean(0)

    one, two, three = maps(1), maps(2), maps(3)
    second, third = 2 * two - one, 3 * three - 2 * two
    for sample in (second, third):
        assert sample.min() > -1e-5
        assert sample.max() < 1 + 1e-5
        assert (sample - one).abs().max() > 1e-3, "the samples have different seeds"
    assert torch.allclose(maps(3, slice(1, 2))[0], three[1], atol=1e-5), "a phrase's ensemble does not depend on its batch"


def test_every_second_sample_of_a_mirrored_ensemble_is_that_of_the_mirrored_image(pipeline):
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    encoders = TextEncoders((pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2))
    texts = encode_phrases(encoders, ["the grass", "two stars"])

    def samples(latents, mirror):
        """Return the samples [3, B, h, w] of an ensemble of three, recovered from the means of one, two and three."""
        means = []
        for size in (1, 2, 3):
            options = {"ensemble_size": size, "mirror": mirror and size > 1}
            point = OperatingPoint(size=64, num_inference_steps=2, guidance_scale=3.0, **options)
            generators = phrase_generators(3, [(1, "n", 0), (1, "n", 1)], point)
            means.append(pipeline.label_maps(latents, texts, generators, point).mean(0))
        return [means[0], 2 * means[1] - means[0], 3 * means[2] - 2 * means[1]]

    plain, flipped, mirrored = samples(latents, False), samples(latents.flip(-1), False), samples(latents, True)
    for sample, expected in zip(mirrored, [plain[0], flipped[1].flip(-1), plain[2]], strict=True):
        assert torch.allclose(sample, expected, atol=1e-4)
    assert (mirrored[1] - plain[1]).abs().max() > 1e-3, "the network is not symmetric"


def test_soft_labels_of_vae_latents_are_the_decoded_grey_values(pipeline):
    masks = (torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    latents = encode_masks(pipeline.vae, masks)
    assert torch.allclose(latents, encode_images(pipeline.vae, (2 * masks - 1).repeat(1, 3, 1, 1)))
    scale = pipeline.config.label_scale
    pipeline.register_to_config(label="vae")
    soft = pipeline.soft_labels(latents * scale)
    pipeline.register_to_config(label="mask")
    assert torch.equal(soft, soften(decode_latents(pipeline.vae, latents).mean(1)))
    assert torch.allclose(pipeline.soft_labels(scale * (2 * masks - 1)), TAIL + (1 - 2 * TAIL) * masks[:, 0])


def test_soft_labels_are_linear_within_bounds_and_monotonic_beyond():
    labels = torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
    soft = soften(labels)
    assert (soft.diff() > 0).all()
    assert soft.min() > 0
    assert soft.max() < 1
    assert torch.allclose(soft + soft.flip(0), torch.ones_like(soft)), "symmetric about 0.5"
    inside = labels.abs() <= 1
    assert torch.allclose(soft[inside], TAIL + (1 - 2 * TAIL) * (labels[inside] + 1) / 2), "the paper's, in [TAIL, 1 - TAIL]"
    slopes = soft.diff() / labels.diff()
    assert (slopes.diff().abs() < 0.1 * slopes.max()).all(), "the slope is continuous"
