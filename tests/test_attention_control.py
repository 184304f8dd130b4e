"""Recording and injection of attention in U-Nets shaped like SD 1.5, SD 2.1 and SDXL."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from genseg.models.attention_control import AttentionCall, AttentionStore, MaskInjection, attention_control

LENGTH = 6
COMMON = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "sample_size": 8,
}
SHAPES = {
    "sd15": COMMON | {"attention_head_dim": 4},
    "sd21": COMMON | {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": COMMON
    | {
        "in_channels": 9,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16 + 6 * 8,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def unet(request):
    torch.manual_seed(0)
    return UNet2DConditionModel(**SHAPES[request.param]).eval().requires_grad_(False)


def inputs(unet, batch=2, height=8, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    added = None
    if unet.config.addition_embed_type:
        added = {"text_embeds": draw(batch, 16), "time_ids": draw(batch, 6)}
    sample, text = draw(batch, unet.config.in_channels, height, width), draw(batch, LENGTH, 24)
    return {"sample": sample, "timestep": 100, "encoder_hidden_states": text, "added_cond_kwargs": added}


def injection(alpha, height=8, width=6):
    tokens = torch.zeros(2, LENGTH, dtype=torch.bool)
    tokens[0, 2:4] = tokens[1, 1] = True
    mask = torch.rand(2, height, width, generator=torch.Generator().manual_seed(2))
    return MaskInjection(mask, tokens, alpha)


def test_disabled_control_is_bit_equal_to_the_stock_network_and_processors_are_restored(unet):
    call = inputs(unet)
    stock, processors = unet(**call).sample, unet.attn_processors
    with attention_control(unet, injection(alpha=0.0)):
        assert torch.equal(unet(**call).sample, stock)
    with attention_control(unet, AttentionStore(kinds=())):
        assert torch.equal(unet(**call).sample, stock)
    with pytest.raises(RuntimeError, match="inside"), attention_control(unet, injection(0.5)):
        raise RuntimeError("inside")
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not unet._forward_pre_hooks


def test_recording_keeps_the_output_and_equals_attention_computed_from_the_projections(unet):
    call, store, layer_inputs = inputs(unet), AttentionStore(), {}
    name = "mid_block.attentions.0.transformer_blocks.0.attn1"
    layer = unet.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, args: layer_inputs.setdefault("x", args[0]))
    stock = unet(**call).sample
    handle.remove()
    with attention_control(unet, store, byte_cap=10_000):
        recorded = unet(**call).sample
    torch.testing.assert_close(recorded, stock, rtol=1e-4, atol=1e-5)
    layers = {}
    for layer_name in (processor.removesuffix(".processor") for processor in unet.attn_processors):
        layer_store = AttentionStore(select=lambda call, layer_name=layer_name: call.name == layer_name)
        with attention_control(unet, layer_store):
            unet(**call)
        [layers[layer_name]] = layer_store.maps.values()
    query, key = (f(layer_inputs["x"]).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for f in (layer.to_q, layer.to_k))
    expected = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    torch.testing.assert_close(layers[name], expected, rtol=1e-4, atol=1e-5)
    grids = {(8, 6), (4, 3)}
    assert set(store.maps) == {(kind, grid) for kind in ("cross", "self") for grid in grids}
    for (kind, (h, w)), value in store.maps.items():
        assert value.shape == (2, h * w, LENGTH if kind == "cross" else h * w)
        torch.testing.assert_close(value.sum(-1), torch.ones(2, h * w))
        same_kind = [
            v for key, v in layers.items() if v.shape == value.shape and key.endswith(("attn1", "attn2")[kind == "cross"])
        ]
        torch.testing.assert_close(value, torch.stack(same_kind).mean(0))


def test_byte_cap_bounds_the_slices_of_a_control_and_does_not_change_the_maps(unet):
    class Largest(AttentionStore):
        largest = 0

        def __call__(self, probabilities, call, rows):
            self.largest = max(self.largest, probabilities.numel() * 4)
            return super().__call__(probabilities, call, rows)

    call, whole, sliced = inputs(unet), Largest(), Largest()
    with attention_control(unet, whole):
        unet(**call)
    with attention_control(unet, sliced, byte_cap=5_000):
        unet(**call)
    assert sliced.largest <= 5_000 < whole.largest
    for key, value in whole.maps.items():
        torch.testing.assert_close(sliced.maps[key], value, rtol=1e-4, atol=1e-6)


def test_store_averages_forward_passes_and_records_only_selected_layers(unet):
    def up_cross(call: AttentionCall) -> bool:
        return call.name.startswith("up_blocks")

    first, second, both = (AttentionStore(kinds=("cross",), select=up_cross) for _ in range(3))
    call, other = inputs(unet), inputs(unet) | {"timestep": 700}
    for arguments, store in ((call, first), (other, second)):
        with attention_control(unet, store):
            unet(**arguments)
        with attention_control(unet, both):
            unet(**arguments)
    for key, value in both.maps.items():
        torch.testing.assert_close(value, (first.maps[key] + second.maps[key]) / 2)
        assert key[0] == "cross"
        assert not torch.equal(first.maps[key], second.maps[key])


def test_injection_changes_the_prediction_of_each_sample_independently(unet):
    call, control = inputs(unet), injection(0.7)
    stock = unet(**call).sample
    with attention_control(unet, control):
        injected = unet(**call).sample
    assert (injected - stock).abs().max() > 1e-4
    alone = {
        key: value[1:] if isinstance(value, torch.Tensor) else value
        for key, value in call.items()
        if key != "added_cond_kwargs"
    }
    added = call["added_cond_kwargs"]
    alone["added_cond_kwargs"] = added and {key: value[1:] for key, value in added.items()}
    with attention_control(unet, MaskInjection(control.mask[1:], control.phrase_tokens[1:], 0.7)):
        torch.testing.assert_close(unet(**alone).sample, injected[1:], rtol=1e-4, atol=1e-5)


def test_half_precision_is_close_to_single_precision(unet):
    import copy

    half = copy.deepcopy(unet).to(torch.bfloat16)
    stores = AttentionStore(), AttentionStore()
    with attention_control(unet, stores[0]):
        unet(**inputs(unet))
    with attention_control(half, stores[1]):
        assert half(**inputs(unet, dtype=torch.bfloat16)).sample.dtype == torch.bfloat16
    for key, value in stores[0].maps.items():
        assert stores[1].maps[key].dtype == torch.float32
        torch.testing.assert_close(stores[1].maps[key], value, rtol=0.05, atol=0.02)


def probabilities(draw_rows, length):
    values = torch.from_numpy(draw_rows).double()
    return (values / values.sum(-1, keepdim=True)).float().reshape(1, 1, -1, length)


unit = st.floats(0, 1, width=32, allow_subnormal=False)
positive = st.floats(2**-12, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (4, 5), elements=positive),
    hnp.arrays(np.float32, 4, elements=unit),
    st.sets(st.integers(0, 4), min_size=1, max_size=4),
)
def test_cross_target_equals_its_equation(raw, mask, inside):
    attention = probabilities(raw, 5)
    tokens = torch.tensor([[j in inside for j in range(5)]])
    target = MaskInjection(torch.zeros(1, 2, 2), tokens, 0.5).cross_target(
        attention[:, :, 1:4], torch.from_numpy(mask)[None], slice(1, 4)
    )
    A = attention[0, 0].numpy()
    for n in range(1, 4):
        for j in range(5):
            group = [i for i in range(5) if (i in inside) == (j in inside)]
            weight = mask[n] if j in inside else 1 - mask[n]
            assert target[0, 0, n - 1, j].item() == pytest.approx(weight * A[n, j] / A[n, group].sum(), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (4, 4), elements=positive), hnp.arrays(np.float32, 4, elements=unit))
def test_self_target_equals_its_equation(raw, mask):
    attention = probabilities(raw, 4)
    W, M = attention[0, 0].double().numpy(), mask.astype(float)
    weighted = W * (np.outer(M, M) + np.outer(1 - M, 1 - M)) + 1e-12
    control = MaskInjection(torch.zeros(1, 2, 2), torch.tensor([[True, False]]), 0.5)
    target = control.self_target(attention, torch.from_numpy(mask)[None], slice(0, 4))
    np.testing.assert_allclose(target[0, 0].numpy(), weighted / weighted.sum(1, keepdims=True), rtol=1e-3, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (4, 4), elements=st.sampled_from([np.float32(0), np.float32(1e-30)])),
    hnp.arrays(np.float32, (2, 2), elements=unit),
)
def test_target_rows_sum_to_one_when_attention_underflows(raw, mask):
    attention = torch.from_numpy(raw)[None, None]
    attention[..., 0] = 1 - attention[..., 1:].sum(-1)
    tokens = torch.tensor([[False, True, True, False]])
    control = MaskInjection(torch.from_numpy(mask)[None], tokens, 0.5)
    flat = torch.from_numpy(mask).reshape(1, 4)
    for target in (control.cross_target, control.self_target):
        torch.testing.assert_close(target(attention, flat, slice(0, 4)).sum(-1), torch.ones(1, 1, 4))


def test_injection_requires_tokens_inside_and_outside_the_phrase():
    for tokens in (torch.zeros(1, 4), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="every prompt"):
            MaskInjection(torch.zeros(1, 2, 2), tokens.bool(), 0.5)
