"""Planned memory against closed forms and against what the same pass holds on the CPU."""

import pytest
import torch
from torch import nn

from genseg.models import sdxl
from genseg.models.flops import meta_inputs, meta_unet
from genseg.models.memory import LiveBytes, activation_bytes, attention_maps
from genseg.models.unet import run_unet

NARROW = sdxl.UNET | {
    "block_out_channels": [32, 64, 64],
    "attention_head_dim": [1, 2, 2],
    "cross_attention_dim": 16,
    "transformer_layers_per_block": [1, 1, 2],
}
SD21 = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}


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
    maps = attention_maps(SD21, latent=64, tokens=77)
    found = [(item.heads, item.queries) for item in maps if item.is_self]
    down = [(5, 4096)] * 2 + [(10, 1024)] * 2 + [(20, 256)] * 2
    assert found == [*down, (20, 64), *[(20, 256)] * 3, *[(10, 1024)] * 3, *[(5, 4096)] * 3]
    cross = [item for item in maps if not item.is_self]
    assert [(item.heads, item.queries) for item in cross] == found
    assert {item.keys for item in cross} == {77}
    assert all(item.keys == item.queries for item in maps if item.is_self)
