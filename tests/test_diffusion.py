"""Schedule, objectives and samplers compared with closed forms and with diffusers."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from genseg.diffusion.guidance import count_evaluations
from genseg.diffusion.objectives import (
    add_noise,
    diffusion_loss,
    discriminative_loss,
    estimate_x_0,
    make_scheduler,
    mask_loss,
    training_target,
)
from genseg.diffusion.sampling import StepContext, ddim_step, dpmpp_step, draw_noise, phrase_generator, sample_labels
from genseg.params import OperatingPoint

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alphas_bar(zero_snr=False):
    return make_scheduler(BETAS, "v_prediction", zero_snr).alphas_cumprod


def point_of(steps, guidance_scale=1.0, **options):
    return OperatingPoint(size=8, num_inference_steps=steps, guidance_scale=guidance_scale, **options)


def test_schedule_equals_that_of_sdxl():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(alphas_bar().double(), (1 - beta).cumprod(0), rtol=1e-4)
    assert alphas_bar()[999].sqrt() == pytest.approx(0.068, abs=1e-3)


def test_zero_terminal_snr_removes_the_signal_and_keeps_the_first_timestep():
    rescaled = alphas_bar(zero_snr=True)
    assert rescaled[999] == 0
    assert rescaled[0] == pytest.approx(alphas_bar()[0].item(), rel=1e-5)
    assert torch.all(rescaled.diff() < 0)


def test_timesteps_of_the_papers_figure_5_are_on_the_trailing_grid():
    def timesteps(spacing):
        scheduler = make_scheduler(BETAS, "epsilon", False, spacing)
        scheduler.set_timesteps(50)
        return set(scheduler.timesteps.tolist())

    assert {999, 759, 519, 279} <= timesteps("trailing")
    assert 999 not in timesteps("leading")


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PREDICTION_TYPES), st.integers(0, 998), st.integers(0, 10**6), st.sampled_from([0.1, 1.0]))
def test_x_0_is_recovered_from_the_training_target(prediction_type, t, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(2))
    alphas, step = alphas_bar(), torch.tensor([t, t // 2])
    x_t = add_noise(x_0, noise, alphas, step)
    target = training_target(prediction_type, x_0, noise, alphas, step, scale)
    assert torch.allclose(estimate_x_0(prediction_type, target, x_t, alphas, step, scale), x_0, atol=2e-4)


def test_noise_and_velocity_agree_with_diffusers():
    scheduler = make_scheduler(BETAS, "v_prediction", True)
    x_0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    assert torch.allclose(add_noise(x_0, noise, scheduler.alphas_cumprod, t), scheduler.add_noise(x_0, noise, t), atol=1e-6)
    velocity = scheduler.get_velocity(x_0, noise, t)
    assert torch.allclose(training_target("v_prediction", x_0, noise, scheduler.alphas_cumprod, t, 1.0), velocity, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp", "mean"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampling_with_a_perfect_denoiser_gives_x_0(prediction_type, sampler, steps):
    scheduler = make_scheduler(BETAS, prediction_type, zero_terminal_snr=prediction_type != "epsilon")
    alphas = scheduler.alphas_cumprod.double()
    x_0 = torch.where(torch.rand(2, 1, 6, 6) > 0.5, 1.0, -1.0)

    def denoise(x_t, t, guided):
        signal, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noise = (x_t - signal * x_0) / sigma
        return training_target(prediction_type, x_0, noise, alphas, t.expand(2), 1.0).float()

    generators = [phrase_generator(0, 1, "n", phrase, 6) for phrase in range(2)]
    noise = draw_noise(generators, (1, 6, 6))
    labels = sample_labels(denoise, scheduler, noise, point_of(steps, sampler=sampler), generators)
    assert torch.allclose(labels, x_0, atol=2e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_steps_agree_with_diffusers_on_grids_that_divide_1000(sampler, spacing, prediction_type):
    scheduler = make_scheduler(BETAS, prediction_type, False, spacing)
    generator = phrase_generator(0, 1, "n", 1, 8)
    x_t = draw_noise([generator], (1, 8, 8))
    ours = sample_labels(lambda x, t, g: 0.2 * x.tanh(), scheduler, x_t, point_of(20, sampler=sampler), [generator])
    if sampler == "ddpm":
        scheduler = DDPMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(20)
    generator = phrase_generator(0, 1, "n", 1, 8)
    draw_noise([generator], (1, 8, 8))
    for t in scheduler.timesteps:
        options = {"generator": [generator]} if sampler == "ddpm" else {}
        x_t = scheduler.step(0.2 * x_t.tanh(), t, x_t, **options).prev_sample
    if sampler == "ddim" or spacing == "trailing":
        assert torch.allclose(ours, x_t, atol=1e-4)
    else:  # on the leading grid, diffusers' DDPM adds noise in its last step (t = 1); ours ends with the estimate of x_0
        assert torch.allclose(ours, x_t, atol=0.2)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm_solver_agrees_with_diffusers(prediction_type, steps):
    scheduler = make_scheduler(BETAS, prediction_type, False)
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")
    config = {name: scheduler.config[name] for name in names}
    theirs = DPMSolverMultistepScheduler(
        **config, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero", lower_order_final=True
    )
    theirs.set_timesteps(steps)
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x_t = start
    for t in theirs.timesteps:
        x_t = theirs.step(0.2 * x_t.tanh(), t, x_t).prev_sample
    ours = sample_labels(lambda x, t, g: 0.2 * x.tanh(), scheduler, start, point_of(steps, sampler="dpmpp"), [])
    assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
    assert torch.allclose(ours, x_t, atol=2e-4)


def test_mean_rule_adds_fresh_noise_to_the_mean_of_all_estimates():
    scheduler = make_scheduler(BETAS, "sample", True)
    start = draw_noise([phrase_generator(0, 1, "n", 1, 8)], (1, 8, 8))
    estimates, x_t, generator = [], start, phrase_generator(0, 1, "n", 1, 8)
    scheduler.set_timesteps(3)
    for alpha in [*scheduler.alphas_cumprod[scheduler.timesteps[1:]], torch.tensor(1.0)]:
        estimates.append(0.7 * x_t.tanh() + 0.1)
        noise = torch.randn(1, 1, 8, 8, generator=generator)
        x_t = alpha.sqrt() * torch.stack(estimates).mean(0).clamp(-1, 1) + (1 - alpha).sqrt() * noise
    point, generator = point_of(3, sampler="mean"), phrase_generator(0, 1, "n", 1, 8)
    ours = sample_labels(lambda x, t, g: 0.7 * x.tanh() + 0.1, scheduler, start, point, [generator])
    assert torch.allclose(ours, torch.stack(estimates).mean(0), atol=1e-6)


def test_dpm_solver_is_second_order_and_ddim_first():
    """For x_0 ~ N(m, s^2) the exact denoiser and flow are known: x_t keeps its distance from the mean in standard deviations.

    Halving the step size must divide the error by four for DPM-Solver++ and by two for DDIM.
    """
    m, s = 0.4, 0.5

    def error(sampler, steps):
        log_snr = torch.linspace(-3, 3, steps + 1, dtype=torch.float64)  # lambda, in equal steps
        alphas = torch.sigmoid(2 * log_snr)
        z = 1.3

        def exact(alpha):
            return alpha.sqrt() * m + (alpha * s**2 + 1 - alpha).sqrt() * z

        x_t, previous = exact(alphas[0]), None
        for alpha, alpha_next in itertools.pairwise(alphas):
            x_0 = m + alpha.sqrt() * s**2 / (alpha * s**2 + 1 - alpha) * (x_t - alpha.sqrt() * m)
            step = ddim_step if sampler == "ddim" else dpmpp_step
            x_t, previous = step(x_t, x_0, StepContext(alpha, alpha_next, [], previous)), (x_0, alpha)
        return abs(x_t - exact(alphas[-1])).item()

    orders = {sampler: math.log2(error(sampler, 64) / error(sampler, 128)) for sampler in ("ddim", "dpmpp")}
    assert orders["ddim"] == pytest.approx(1, abs=0.15)
    assert orders["dpmpp"] == pytest.approx(2, abs=0.25)
    assert error("dpmpp", 16) < error("ddim", 16)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 25) | st.sampled_from([61, 103, 122, 201]),  # diffusers' trailing grid ends with t = -1 here
    st.sampled_from([1.0, 2.0]),
    st.none() | st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
    st.integers(1, 3),
)
def test_count_evaluations_equals_the_number_of_network_evaluations(steps, guidance_scale, interval, ensemble_size):
    guidance_interval = None if interval is None else (interval[0] / 10, interval[1] / 10)
    point = point_of(steps, guidance_scale, guidance_interval=guidance_interval, ensemble_size=ensemble_size)
    evaluated = []

    def denoise(x_t, t, guided):
        evaluated.append((int(t), guided))
        return x_t.repeat(2 if guided else 1, 1, 1, 1)

    scheduler = make_scheduler(BETAS, "sample", True)
    for _ in range(ensemble_size):
        sample_labels(denoise, scheduler, torch.zeros(1, 1, 1, 1), point, [])
    assert count_evaluations(point) == sum(1 + guided for _, guided in evaluated)
    timesteps = [t for t, _ in evaluated[:steps]]
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
    if guidance_scale != 1 and interval is not None:  # on the trailing grid, a step starts at (t + 1) / 1000
        assert all(guided == (interval[0] * 100 <= t + 1 <= interval[1] * 100) for t, guided in evaluated if (t + 1) % 100)


def test_guidance_is_equation_10_and_costs_two_evaluations():
    scheduler = make_scheduler(BETAS, "sample", True)
    calls = []

    def denoise(x_t, t, guided):
        calls.append(guided)
        conditional, unconditional = torch.full_like(x_t, 0.3), torch.full_like(x_t, 0.1)
        return torch.cat([conditional, unconditional]) if guided else conditional

    noise = torch.randn(1, 1, 2, 2)
    assert sample_labels(denoise, scheduler, noise, point_of(1, 2.5), []).unique().item() == pytest.approx(0.1 + 2.5 * 0.2)
    assert sample_labels(denoise, scheduler, noise, point_of(1), []).unique().item() == pytest.approx(0.3)
    assert calls == [True, False]


def test_ddpm_noise_of_a_phrase_is_independent_of_its_batch():
    scheduler = make_scheduler(BETAS, "v_prediction", True)

    def run(phrases):
        generators = [phrase_generator(0, 1, "n", phrase, 8) for phrase in phrases]
        noise = draw_noise(generators, (1, 8, 8))
        return sample_labels(lambda x, t, g: 0.1 * x, scheduler, noise, point_of(5, sampler="ddpm"), generators)

    together, alone = run([1, 2, 3]), run([2])
    assert torch.equal(together[1], alone[0])


def test_mask_loss_is_independent_of_the_label_scale_and_lowest_for_the_mask():
    mask = (torch.rand(3, 1, 8, 8) > 0.5).float()
    label = 2 * mask - 1
    assert torch.allclose(mask_loss(0.1 * label, mask, 0.1), mask_loss(label, mask, 1.0))
    assert torch.all(mask_loss(label, mask, 1.0) < mask_loss(0.5 * label, mask, 1.0))
    assert torch.all(mask_loss(0.5 * label, mask, 1.0) < mask_loss(-label, mask, 1.0))


def test_losses_of_known_outputs():
    logits = torch.tensor([[[[20.0, -20.0]]], [[[-20.0, 20.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])
    right, wrong = discriminative_loss(logits, mask)
    assert right < 1e-6
    assert wrong > 20
    assert diffusion_loss(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)).tolist() == [9.0, 9.0]
