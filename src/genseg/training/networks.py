"""The trained networks (label U-Net and text adapter), their optimizer and FLOPs, and the pipeline that contains them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from genseg.artifacts.files import atomic_directory
from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.objectives import make_scheduler
from genseg.diffusion.pipeline import GSPipeline
from genseg.models.adapter import TextAdapter
from genseg.models.attention import self_attention_widths
from genseg.models.backbone import load_text_encoders, load_unet, load_vae
from genseg.models.flops import training_flops, unet_flops
from genseg.models.text import TextEmbedding
from genseg.models.unet import label_unet, run_unet
from genseg.params import Params
from genseg.params.train import Optimizer, Train
from genseg.training.data import PhraseData
from genseg.training.stages import Kind, StageSpan


class Networks(nn.Module):
    """The trained networks: label U-Net and text adapter."""

    def __init__(self, unet: UNet2DConditionModel, adapter: TextAdapter) -> None:
        super().__init__()
        self.unet, self.adapter = unet, adapter

    def forward(
        self, x_t: Tensor, image_latents: Tensor, t: Tensor, texts: list[TextEmbedding], drop: Tensor | None, size: int
    ) -> Tensor:
        """Return the U-Net's output [B, K, h, w] for x_t [B, K, h, w], image latents [B, 4, h, w] of images of `size` pixels,
        t [B] and B texts. `drop` [B] bool marks samples whose text is replaced by the null embeddings; None for none."""
        output = run_unet(self.unet, x_t, image_latents, t, self.adapter(texts, drop), (size, size))
        if torch.is_grad_enabled() and dist.is_initialized():
            # All processes must have gradients for the same parameters: give unused null embeddings a gradient of zero.
            output = output + 0 * sum(parameter.sum() for parameter in self.adapter.parameters())
        return output


def build_networks(
    params: Params, source: str, revision: str | None, empty: TextEmbedding, label_channels: int = 1
) -> Networks:
    """Build the initial networks (fp32 master weights) from the backbone `source`. The learned null embeddings are initialised
    from `empty`, the embedding of the empty text. `label_channels` is K, the number of channels of x_0."""
    torch.manual_seed(derive_seed(params.train.seed, "networks") % 2**31)
    unet = label_unet(load_unet(source, revision), params.train.conv_in_init, label_channels)
    adapter = TextAdapter(
        token_width=empty.tokens.shape[-1],
        pooled_width=empty.pooled.shape[-1],
        widths=tuple(self_attention_widths(unet)) if params.train.token_injection else (),
        text=params.train.text,
        null_tokens=len(empty.tokens) if params.train.text == "tokens" else 1,
    )
    adapter.start_nulls_from(empty)
    networks = Networks(unet, adapter).requires_grad_(True).train()
    if params.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return networks


def parameter_groups(networks: Networks, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: a single one as in the paper or, if `lr_new` is given, one of pretrained weights
    and one of new layers (conv_in, conv_out, adapter). `base_lr` is a group's learning rate before any schedule."""
    new_layers = (networks.unet.conv_in, networks.unet.conv_out, networks.adapter) if optimizer.lr_new is not None else ()
    new_ids = {id(parameter) for module in new_layers for parameter in module.parameters()}
    groups = []
    for is_new, lr in ((False, optimizer.lr), (True, optimizer.lr_new)):
        parameters = [parameter for parameter in networks.parameters() if (id(parameter) in new_ids) == is_new]
        if parameters:
            groups.append({"params": parameters, "lr": lr, "base_lr": lr})
    return groups


def make_optimizer(networks: Networks, optimizer: Optimizer) -> torch.optim.Optimizer:
    """Return Adam or AdamW over the parameter groups."""
    cls = torch.optim.Adam if optimizer.name == "adam" else torch.optim.AdamW
    return cls(parameter_groups(networks, optimizer), betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True)


@torch.no_grad()
def average_weights(average: nn.Module, networks: nn.Module, decay: float) -> None:
    """Set average = decay * average + (1 - decay) * networks. With decay 0, this is an exact copy."""
    for mean, parameter in zip(average.parameters(), networks.parameters(), strict=True):
        mean.lerp_(parameter, 1 - decay)


def sample_flops(networks: Networks, data: PhraseData, train: Train, span: StageSpan) -> float:
    """Return the FLOPs of one training sample whose phrase is as long as the first one. The small adapter is not counted."""
    tokens = len(data.texts[data.rows["phrase"].iloc[0]].tokens) if train.text == "tokens" else 1
    forward = unet_flops(networks.unet.config, data.label_shape[-1], tokens, train.token_injection)
    return training_flops(forward, recomputed=False) + span.extra_passes * forward


def make_training_scheduler(train: Train, betas: dict[str, Any]) -> DDIMScheduler:
    """Return the scheduler of training and of the saved pipeline. It clips estimates of x_0 to the label range if the labels
    are masks and the network does not predict the noise."""
    is_clipped = train.label == "mask" and train.prediction_type != "epsilon"
    clip_range = train.label_scale if is_clipped else None
    return make_scheduler(betas, train.prediction_type, train.zero_terminal_snr, clip_range=clip_range)


def save_pipeline(
    folder: Path, params: Params, kind: Kind, networks: Networks, scheduler: DDIMScheduler, backbone: dict[str, Any]
) -> None:
    """Write a pipeline that loads with `GSPipeline.from_pretrained`: the trained networks, and the VAE and text
    encoders of the backbone, whose manifest is `backbone`."""
    source, revision = backbone["pipeline"], backbone["revision"]
    encoders = load_text_encoders(source, revision)
    prediction_type = params.train.prediction_type if kind == "gs" else "logits"
    is_noise_prediction = prediction_type == "epsilon"
    is_distilled = any(stage.objective == "distill" for stage in params.train.stages)
    pipeline = GSPipeline(
        vae=load_vae(source, revision),
        text_encoder=encoders.models[0],
        text_encoder_2=encoders.models[1],
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        unet=networks.unet.eval(),
        adapter=networks.adapter.eval(),
        scheduler=scheduler,
        prediction_type=prediction_type,
        label_scale=params.train.label_scale,
        label="mask" if kind == "discriminative" else params.train.label,
        default_processing_resolution=params.train.size,
        # Noise prediction uses the paper's operating point. With v and x_0, the first step already gives a usable estimate,
        # and guidance improves it little. Distilled networks have learned the guided output.
        default_denoising_steps=50 if is_noise_prediction else 1,
        default_guidance_scale=7.5 if is_noise_prediction and not is_distilled else 1.0,
    )
    with atomic_directory(folder) as temporary:
        pipeline.save_pretrained(temporary)
