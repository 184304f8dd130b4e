"""DDIM inversion and null-text optimisation (Mokady et al. 2023, Alg. 1), for a batch of prompts of one image."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from genseg.models.text_to_image import Prompts, TextToImage
from genseg.params.baselines import Inversion


def noise_of(output: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """Convert a U-Net's output at x_t to a noise estimate; `alpha` is alpha_bar_t."""
    if prediction_type == "epsilon":
        return output.float()
    if prediction_type == "sample":
        return (x_t - alpha.sqrt() * output.float()) / (1 - alpha).sqrt()
    return alpha.sqrt() * output.float() + (1 - alpha).sqrt() * x_t


def ddim_step(x: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """Take a DDIM step with eta 0 from one noise level to another, in either direction."""
    x_0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next).sqrt() * noise


def null_text_passes(inversion: Inversion) -> tuple[int, int]:
    """Return the largest number of forward passes of `null_text_inversion` per prompt, and how many have a backward pass."""
    with_gradient = inversion.steps * inversion.inner_steps
    return 3 * inversion.steps + with_gradient, with_gradient  # inversion, conditional pass, pass with the final null text


def null_text_inversion(
    model: TextToImage,
    latent: torch.Tensor,
    prompts: Prompts,
    empty: Prompts,
    inversion: Inversion,
    record: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """Invert an image and reconstruct it with optimised null texts.

    The inversion is DDIM without guidance along each prompt. The reconstruction is DDIM with guidance; at every step Adam
    optimises the null text, in at most `inner_steps` steps, until the guided step reaches the inverted trajectory. The prompts
    are independent: one whose error is below the tolerance is no longer updated.

    Args:
        latent: [1, 4, h, w].
        prompts: B prompts.
        empty: the empty prompt, one row.
        record: returns the context in which the conditional pass of each reconstruction step runs; called once per step.

    Returns:
        The reconstructed latents x_0 [B, 4, h, w].
    """
    rows, count = len(prompts), inversion.steps
    times = [1 + step * (len(model.alphas) // count) for step in range(count)]  # ascending; "leading" spacing, offset 1
    levels = [model.alphas[0], *(model.alphas[t] for t in times)]

    def noise(x: torch.Tensor, step: int, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        output = model.predict(x, times[step], latent, tokens, pooled)
        return noise_of(output, x, levels[step + 1], model.prediction_type)

    # 1. Invert: trajectory[step] is the latent at levels[step].
    trajectory = [latent.float().expand(rows, -1, -1, -1)]
    with torch.no_grad():
        for step in range(count):
            estimate = noise(trajectory[-1], step, prompts.tokens, prompts.pooled)
            trajectory.append(ddim_step(trajectory[-1], estimate, levels[step], levels[step + 1]))

    # 2. Reconstruct, from the highest noise level down.
    x, null, pooled = trajectory[-1], empty.tokens.float().repeat(rows, 1, 1), empty.pooled.expand(rows, -1)
    for index, step in enumerate(reversed(range(count))):
        with torch.no_grad(), record():
            conditional = noise(x, step, prompts.tokens, prompts.pooled)

        def guided_step(
            null: torch.Tensor, step: int = step, x: torch.Tensor = x, conditional: torch.Tensor = conditional
        ) -> torch.Tensor:
            unconditional = noise(x, step, null, pooled)
            estimate = unconditional + inversion.guidance_scale * (conditional - unconditional)
            return ddim_step(x, estimate, levels[step + 1], levels[step])

        # Optimise the null texts [B, L, D] with Adam until the mean squared error of the guided step is below the tolerance.
        null, tolerance = null.detach().requires_grad_(), inversion.tolerance + index * 2e-5
        adam = torch.optim.Adam([null], lr=inversion.lr * (1 - index / (2 * count)))
        for _ in range(inversion.inner_steps):
            with torch.enable_grad():
                loss = (guided_step(null) - trajectory[step]).square().mean((1, 2, 3))
                (gradient,) = torch.autograd.grad(loss.sum(), null)
            unfinished = loss.detach() >= tolerance
            if not unfinished.any():
                break
            previous, null.grad = null.detach().clone(), gradient
            adam.step()
            with torch.no_grad():
                null.copy_(torch.where(unfinished[:, None, None], null, previous))
        null = null.detach()
        with torch.no_grad():
            x = guided_step(null)
    return x
