"""DDIM inversion and null-text optimisation (Mokady et al. 2023, Alg. 1), for a batch of prompts of one image."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from genseg.models.text_to_image import Prompts, TextToImage
from genseg.params import Inversion


def noise_of(answer: torch.Tensor, x_t: torch.Tensor, alpha: torch.Tensor, prediction_type: str) -> torch.Tensor:
    """The noise that a U-Net's answer stands for, at alpha_bar_t."""
    if prediction_type == "epsilon":
        return answer.float()
    if prediction_type == "sample":
        return (x_t - alpha.sqrt() * answer.float()) / (1 - alpha).sqrt()
    return alpha.sqrt() * answer.float() + (1 - alpha).sqrt() * x_t


def ddim_move(x: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, alpha_next: torch.Tensor) -> torch.Tensor:
    """DDIM with eta 0 from one noise level to another, up or down."""
    x_0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    return alpha_next.sqrt() * x_0 + (1 - alpha_next).sqrt() * noise


def replay_passes(inversion: Inversion) -> tuple[int, int]:
    """U-Net passes of `replay` for one prompt, at most, and how many of these are followed by one back to the null text: at
    each step one up, one conditional, `inner_steps` with a gradient and one that is taken."""
    descent = inversion.steps * inversion.inner_steps
    return 3 * inversion.steps + descent, descent


def replay(
    model: TextToImage,
    latent: torch.Tensor,
    prompts: Prompts,
    empty: Prompts,
    inversion: Inversion,
    record: Callable[[], AbstractContextManager],
) -> torch.Tensor:
    """Invert an image, find the null texts that lead back to it under guidance, go back; returns x_0 [B, 4, h, w] as found.

    Upwards DDIM without guidance along each prompt; downwards, at every step, the null text is moved by Adam until the
    guided step meets the inverted trajectory (at most `inner_steps` times, a prompt that is near enough rests), and then
    taken. Every prompt's row is a computation of its own.

    Args:
        latent: [1, 4, h, w]. empty: the empty prompt, one row.
        record: gives a context for each conditional pass of the way back, one a step.
    """
    rows, count = len(prompts), inversion.steps
    times = [1 + step * (len(model.alphas) // count) for step in range(count)]  # ascending, "leading" with offset 1
    levels = [model.alphas[0], *(model.alphas[t] for t in times)]

    def noise(x: torch.Tensor, step: int, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        answer = model.predict(x, times[step], latent, tokens, pooled)
        return noise_of(answer, x, levels[step + 1], model.prediction_type)

    path = [latent.float().expand(rows, -1, -1, -1)]
    with torch.no_grad():
        for step in range(count):
            estimate = noise(path[-1], step, prompts.tokens, prompts.pooled)
            path.append(ddim_move(path[-1], estimate, levels[step], levels[step + 1]))
    x, null, pooled = path[-1], empty.tokens.float().repeat(rows, 1, 1), empty.pooled.expand(rows, -1)
    for step in reversed(range(count)):
        place = count - 1 - step
        with torch.no_grad(), record():
            conditional = noise(x, step, prompts.tokens, prompts.pooled)

        def guided(tokens: torch.Tensor, step: int = step, x: torch.Tensor = x, up: torch.Tensor = conditional) -> torch.Tensor:
            down = noise(x, step, tokens, pooled)
            return ddim_move(x, down + inversion.guidance * (up - down), levels[step + 1], levels[step])

        null = null.detach().requires_grad_()
        adam = torch.optim.Adam([null], lr=inversion.lr * (1 - place / (2 * count)))
        for _ in range(inversion.inner_steps):
            with torch.enable_grad():
                loss = (guided(null) - path[step]).square().mean((1, 2, 3))
                (gradient,) = torch.autograd.grad(loss.sum(), null)
            far = loss.detach() >= inversion.tolerance + place * 2e-5
            if not far.any():
                break
            before, null.grad = null.detach().clone(), gradient
            adam.step()
            with torch.no_grad():
                null.copy_(torch.where(far[:, None, None], null, before))
        null = null.detach()
        with torch.no_grad():
            x = guided(null)
    return x
