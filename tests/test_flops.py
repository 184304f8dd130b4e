"""Counted operations against closed forms and against the figures known for SDXL."""

import pytest

from genseg.models import sdxl
from genseg.models.flops import find_gpu, meta_text_encoder, text_flops, training_flops, unet_flops, vae_flops


@pytest.mark.parametrize("tokens", [2, 77])
def test_a_text_encoder_is_its_matrix_products(tokens):
    config = sdxl.TEXT_ENCODER | {"num_hidden_layers": 3}
    width, inner = config["hidden_size"], config["intermediate_size"]
    products = 4 * width * width + 2 * width * inner  # q, k, v, out; two of the MLP
    attention = 2 * tokens * tokens * width  # every query with every key, every weight with every value
    assert text_flops(config, tokens, projection=False) == 2 * 3 * (tokens * products + attention)


def test_sdxl_at_1024():
    assert unet_flops(sdxl.UNET, 128, 77, inject=False) == pytest.approx(6.76e12, rel=1e-3)
    encode, decode = vae_flops(sdxl.VAE, 1024)
    assert encode == pytest.approx(4.88e12, rel=1e-3)
    assert decode == pytest.approx(10.5e12, rel=5e-3)


def test_injected_tokens_cost_their_keys_and_values():
    """One more token in self-attention of width C at N positions: k and v of the token, and N queries with it, both ways."""
    config = sdxl.UNET | {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 2], "cross_attention_dim": 16}
    with_text, without = (unet_flops(config, 16, 3, inject) for inject in (True, False))
    wanted = 0
    for layers, positions in ((10, 8 * 8), (60, 4 * 4)):  # 2 x 2 down + 3 x 2 up; 2 x 10 down + 10 mid + 3 x 10 up
        wanted += layers * 3 * (2 * 2 * 64 * 64 + 2 * 2 * positions * 64)
    assert with_text - without == wanted


def test_training_is_three_passes_and_a_fourth_when_recomputed():
    assert (training_flops(10, recomputed=False), training_flops(10, recomputed=True)) == (30, 40)


def test_sdxl_text_encoders_have_their_published_size():
    sizes = [
        sum(parameter.numel() for parameter in meta_text_encoder(config, projection).parameters())
        for config, projection in ((sdxl.TEXT_ENCODER, False), (sdxl.TEXT_ENCODER_2, True))
    ]
    assert sizes == [123_060_480, 694_659_840]


@pytest.mark.parametrize(
    ("name", "memory"), [("NVIDIA H200", 141), ("NVIDIA A100-SXM4-40GB", 43), ("NVIDIA A100-SXM4-80GB", 86), ("Tesla T4", None)]
)
def test_gpus_are_found_by_the_drivers_name(name, memory):
    gpu = find_gpu(name)
    assert (gpu and round(gpu.memory / 1e9)) == memory
