"""Refinement of a labelling: the class phrases of an image compete for its pixels.

G4Seg refines one class at a time, so a class that is absent from the image cannot lose its pixels to another one. Here the
generator decides between the classes, as a diffusion classifier (Li et al. 2023, "Your diffusion model is secretly a zero-shot
classifier") of cells instead of images. With K labels (the classes and, if the data have one, the background) and N cells:

    1. Evidence     x_c [N], by which the prompt of class c reduces the error of the predicted noise, compared with no prompt
    2. Alignment    x and the coarse labelling C [K, N], averaged over cells with similar features: A x and A C
    3. Update       P_c = (rho C_c + (1 - rho) / K) exp(x_c), normalised; rho, the reliability of C, is estimated by EM
    4. Read-out     the label with the highest probability at native size, by a dense CRF

Masks are not injected: the evidence belongs to the image, and all coarse labellings of an image share it. rho measures
agreement, so evidence without information (a generator that does not know the classes) lowers the trust in a right labelling.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.special import softmax

from genseg.artifacts.resample import Map, area_reduce, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.interchange.labels import Labels
from genseg.params.refine import Refine
from genseg.refine.crf import dense_crf
from genseg.refine.g4seg_steps import PhraseBlock, correspondence, reference_features

EM_STEPS = 20
"""Steps of the estimation of rho."""


@torch.no_grad()
def class_evidence(block: PhraseBlock, phrases: Sequence[str], seed: int) -> Map:
    """Return the evidence x [K, N] of K class phrases for the image of the first phrase of a block.

    x_c is the squared error of the predicted noise with the empty prompt minus that with the prompt of class c, averaged over
    `evidence_noises` noises and summed over `evidence_timesteps`. The differences of each timestep are divided by their
    standard deviation over classes and cells, since they fall with t by orders of magnitude.
    """
    model, refine, z_0 = block.model, block.refine, block.latents[:1]
    prompts = model.embed(list(phrases), refine.prompt)
    batches = [model.embed([""]), *(prompts[start : start + refine.batch] for start in range(0, len(prompts), refine.batch))]
    total = z_0.new_zeros(len(prompts), *z_0.shape[2:])
    for t in refine.evidence_timesteps:
        difference, alpha_bar = torch.zeros_like(total), model.alphas[t]
        for number in range(refine.evidence_noises):
            generator = torch.Generator().manual_seed(derive_seed(seed, "class evidence", block.traces[0].key[0], t, number))
            noise = torch.randn(z_0.shape, generator=generator).to(z_0)
            z_t, target = alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * noise, noise
            if model.prediction_type == "v_prediction":  # proportional to the error of the noise
                target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z_0
            errors = [
                (model.predict(z_t.expand(len(part), -1, -1, -1), t, z_0, part.tokens, part.pooled).float() - target).square()
                for part in batches
            ]
            difference += errors[0].mean(1) - torch.cat(errors[1:]).mean(1)
        total += difference / difference.std().clamp_min(1e-12)
    return F.interpolate(total[None], block.grid, mode="bilinear")[0].flatten(1).cpu().numpy()


def alignment(block: PhraseBlock) -> Map:
    """Return A [N, N] = softmax(-D / T) of the distances D between features of the original; rows sum to 1."""
    reference = [features[:1] for features in reference_features(block)]
    return torch.softmax(-correspondence(reference, reference)[0] / block.refine.temperature, 1).cpu().numpy()


def reliability(coarse: Map, likelihood: Map) -> float:
    """Return the weight rho in [0, 1] with the highest likelihood of the mixture rho C + (1 - rho) / K over the cells.

    Args:
        coarse: C [K, N], whose columns sum to 1.
        likelihood: likelihood [K, N] of each label, up to a factor per cell.
    """
    explained, uniform, rho = (coarse * likelihood).sum(0), likelihood.mean(0), 0.5
    for _ in range(EM_STEPS):
        rho = float((rho * explained / (rho * explained + (1 - rho) * uniform)).mean())
    return rho


def update_labels(coarse: Map, evidence: Map | None, aligned: Map) -> Map:
    """Return P [K, N] from the coarse labelling C [K, N], evidence x [K', N] and A [N, N]; columns sum to 1.

    The evidence of labels after the first K' (the background) is 0. Without evidence, P is A C. A x is divided by its standard
    deviation, so that evidence of every generator has the same weight.
    """
    prior = coarse @ aligned.T
    if evidence is None:
        return prior
    matched = np.zeros_like(prior)
    matched[: len(evidence)] = evidence @ aligned.T
    likelihood = softmax(matched / max(float(matched.std()), 1e-12), axis=0)
    rho = reliability(prior, likelihood)
    posterior = likelihood * (rho * prior + (1 - rho) / len(prior))
    return np.asarray(posterior / posterior.sum(0), np.float32)


def coarse_cells(labels: Labels, count: int, side: int) -> Map:
    """Return C [count, side * side], the area of each label in each cell; a pixel labelled -1 has all labels."""
    one_hot = (labels == np.arange(count)[:, None, None]).astype(np.float32)
    one_hot[:, labels < 0] = 1 / count
    return area_reduce(one_hot, side, side).reshape(count, -1)


def read_out_labels(probability: Map, picture: NDArray[np.uint8], refine: Refine) -> Labels:
    """Return the labels [H, W] of a picture [H, W, 3] from P [K, h, w], by a dense CRF over the labels that win a pixel."""
    large = bilinear(probability, *picture.shape[:2])
    winners = np.unique(large.argmax(0))
    kept = large[winners] + np.float32(1e-6)
    return winners[dense_crf(kept / kept.sum(0), picture, refine.crf).argmax(0)]


def shuffle_changes(coarse: Labels, refined: Labels, seed: int) -> Labels:
    """Return the coarse labels [H, W] with as many pixels changed as in the refined ones, to the same labels, at random."""
    rng, shuffled = np.random.default_rng(seed), coarse.copy()
    new = refined[coarse != refined]
    shuffled.flat[rng.choice(coarse.size, size=len(new), replace=False)] = rng.permutation(new)
    return shuffled
