"""Operation counts compared with closed forms and with published figures of SDXL."""

import pytest

from genseg.models import sdxl
from genseg.models.flops import find_gpu, meta_text_encoder, text_flops, training_flops, unet_flops, vae_flops


@pytest.mark.parametrize("tokens", [2, 77])
def test_text_encoder_flops_equal_the_closed_form(tokens):
    config = sdxl.TEXT_ENCODER | {"num_hidden_layers": 3}
    width, inner = config["hidden_size"], config["intermediate_size"]
    products = 4 * width * width + 2 * width * inner  # q, k, v and output projections; two layers of the MLP
    attention = 2 * tokens * tokens * width  # queries times keys, weights times values
    assert text_flops(config, tokens, projection=False) == 2 * 3 * (tokens * products + attention)


def test_sdxl_at_1024_has_the_known_flops():
    assert unet_flops(sdxl.UNET, 128, 77, inject=False) == pytest.approx(6.76e12, rel=1e-3)
    encode, decode = vae_flops(sdxl.VAE, 1024)
    assert encode == pytest.approx(4.88e12, rel=1e-3)
    assert decode == pytest.approx(10.5e12, rel=5e-3)


def test_injected_token_flops_equal_the_closed_form():
    """An injected token in self-attention of width C at N positions adds a key, a value, N logits and N weighted values."""
    config = sdxl.UNET | {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2], "cross_attention_dim": 16}
    with_text, without = (unet_flops(config, 16, 3, inject) for inject in (True, False))
    expected = 0
    for layers, positions in ((10, 8 * 8), (60, 4 * 4)):  # 2 x 2 down + 3 x 2 up; 2 x 10 down + 10 mid + 3 x 10 up
        expected += layers * 3 * (2 * 2 * 64 * 64 + 2 * 2 * positions * 64)
    assert with_text - without == expected


def test_training_costs_three_forward_passes_and_a_fourth_with_recomputation():
    assert (training_flops(10, recomputed=False), training_flops(10, recomputed=True)) == (30, 40)


def test_sdxl_text_encoders_have_the_published_number_of_parameters():
    sizes = [
        sum(parameter.numel() for parameter in meta_text_encoder(config, projection).parameters())
        for config, projection in ((sdxl.TEXT_ENCODER, False), (sdxl.TEXT_ENCODER_2, True))
    ]
    assert sizes == [123_060_480, 694_659_840]


@pytest.mark.parametrize(
    ("name", "memory", "peak"),
    [
        ("NVIDIA B200", 180, 2250),
        ("NVIDIA H200", 141, 989),
        ("NVIDIA GH200 480GB", 96, 989),
        ("NVIDIA H100 80GB HBM3", 86, 989),
        ("NVIDIA H100 PCIe", 86, 756),
        ("NVIDIA A100-SXM4-40GB", 43, 312),
        ("NVIDIA A100-SXM4-80GB", 86, 312),
        ("Tesla V100-SXM2-32GB", 34, 125),
        ("NVIDIA GeForce RTX 4090", 26, 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA A10G", None, None),
    ],
)
def test_find_gpu_recognises_device_names(name, memory, peak):
    gpu = find_gpu(name)
    assert (gpu and round(gpu.memory / 1e9)) == memory
    assert (gpu and round(gpu.half / 1e12)) == peak
