"""Schedule, objectives and samplers against closed forms and against diffusers."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from genseg.diffusion.objectives import diffusion_loss, discriminative_loss, estimate_x_0, noised, target, task_loss
from genseg.diffusion.sampling import ddim_step, dpmpp_step, draw_noise, phrase_generator, sample_labels
from genseg.diffusion.schedule import make_scheduler
from genseg.params import Point

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTIONS = ("noise", "v", "x0")


def levels(zero_snr=False):
    return make_scheduler(BETAS, "v", zero_snr).alphas_cumprod


def test_schedule_is_sdxls():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(levels().double(), (1 - beta).cumprod(0), rtol=1e-4)
    assert levels()[999].sqrt() == pytest.approx(0.068, abs=1e-3)


def test_zero_terminal_snr_leaves_nothing_and_keeps_the_start():
    rescaled = levels(zero_snr=True)
    assert rescaled[999] == 0
    assert rescaled[0] == pytest.approx(levels()[0].item(), rel=1e-5)
    assert torch.all(rescaled.diff() < 0)


def test_the_papers_figure_5_is_on_the_trailing_grid():
    def timesteps(spacing):
        scheduler = make_scheduler(BETAS, "noise", False, spacing=spacing)
        scheduler.set_timesteps(50)
        return set(scheduler.timesteps.tolist())

    assert {999, 759, 519, 279} <= timesteps("trailing")
    assert 999 not in timesteps("leading")


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(PREDICTIONS), st.integers(0, 998), st.integers(0, 10**6), st.sampled_from([0.1, 1.0]))
def test_x_0_is_recovered_from_the_true_answer(prediction, t, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = (torch.randn(2, 1, 4, 4, generator=generator) for _ in range(2))
    alphas, step = levels(), torch.tensor([t, t // 2])
    x_t = noised(x_0, noise, alphas, step)
    answer = target(prediction, x_0, noise, alphas, step, scale)
    assert torch.allclose(estimate_x_0(prediction, answer, x_t, alphas, step, scale), x_0, atol=2e-4)


def test_noising_and_velocity_agree_with_diffusers():
    scheduler = make_scheduler(BETAS, "v", True)
    x_0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    assert torch.allclose(noised(x_0, noise, scheduler.alphas_cumprod, t), scheduler.add_noise(x_0, noise, t), atol=1e-6)
    velocity = scheduler.get_velocity(x_0, noise, t)
    assert torch.allclose(target("v", x_0, noise, scheduler.alphas_cumprod, t, 1.0), velocity, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("rule", ["ddim", "ddpm", "dpmpp"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_perfect_denoiser_is_sampled_to_x_0(prediction, rule, steps):
    zero_snr = prediction != "noise"
    scheduler = make_scheduler(BETAS, prediction, zero_snr)
    alphas = scheduler.alphas_cumprod.double()
    x_0 = torch.where(torch.rand(2, 1, 6, 6) > 0.5, 1.0, -1.0)

    def denoise(x_t, t, guided):
        signal, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        noise = (x_t - signal * x_0) / sigma
        return target(prediction, x_0, noise, alphas, t.expand(2), 1.0).float()

    generators = [phrase_generator(0, 1, "n", phrase, 6) for phrase in range(2)]
    noise = draw_noise(generators, (1, 6, 6))
    found = sample_labels(denoise, scheduler, noise, steps, 1.0, generators, rule=rule)
    assert torch.allclose(found, x_0, atol=2e-3)


@pytest.mark.parametrize("rule", ["ddim", "ddpm"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_agree_with_diffusers_where_its_grid_is_exact(rule, spacing, prediction):
    scheduler = make_scheduler(BETAS, prediction, False, spacing)
    generator = phrase_generator(0, 1, "n", 1, 8)
    x_t = draw_noise([generator], (1, 8, 8))
    ours = sample_labels(lambda x, t, g: 0.2 * x.tanh(), scheduler, x_t, 20, 1.0, [generator], rule=rule)
    if rule == "ddpm":
        scheduler = DDPMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(20)
    generator = phrase_generator(0, 1, "n", 1, 8)
    draw_noise([generator], (1, 8, 8))
    for t in scheduler.timesteps:
        options = {"generator": [generator]} if rule == "ddpm" else {}
        x_t = scheduler.step(0.2 * x_t.tanh(), t, x_t, **options).prev_sample
    if rule == "ddim" or spacing == "trailing":
        assert torch.allclose(ours, x_t, atol=1e-4)
    else:  # diffusers' leading DDPM draws variance at its last step (t = 1), ours ends at the estimate of x_0
        assert torch.allclose(ours, x_t, atol=0.2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_dpm_solver_agrees_with_diffusers(prediction, steps):
    scheduler = make_scheduler(BETAS, prediction, False)
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
    ours = sample_labels(lambda x, t, g: 0.2 * x.tanh(), scheduler, start, steps, 1.0, [], rule="dpmpp")
    assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
    assert torch.allclose(ours, x_t, atol=2e-4)


def test_dpm_solver_is_second_order_and_ddim_first():
    """On x_0 ~ N(m, s^2) the exact denoiser and the exact flow are known: x_t keeps its distance from the mean in units of its
    standard deviation. Half the step size must quarter the error of the one and halve that of the other."""
    m, s = 0.4, 0.5

    def error(rule, steps):
        log_snr = torch.linspace(-3, 3, steps + 1, dtype=torch.float64)  # lambda, in equal steps
        alphas = torch.sigmoid(2 * log_snr)
        z = 1.3

        def exact(alpha):
            return alpha.sqrt() * m + (alpha * s**2 + 1 - alpha).sqrt() * z

        x_t, previous = exact(alphas[0]), None
        for alpha, alpha_next in itertools.pairwise(alphas):
            x_0 = m + alpha.sqrt() * s**2 / (alpha * s**2 + 1 - alpha) * (x_t - alpha.sqrt() * m)
            if rule == "ddim":
                x_t = ddim_step(x_t, x_0, alpha, alpha_next)
            else:
                x_t, previous = dpmpp_step(x_t, x_0, alpha, alpha_next, previous), (x_0, alpha)
        return abs(x_t - exact(alphas[-1])).item()

    orders = {rule: math.log2(error(rule, 64) / error(rule, 128)) for rule in ("ddim", "dpmpp")}
    assert orders["ddim"] == pytest.approx(1, abs=0.15)
    assert orders["dpmpp"] == pytest.approx(2, abs=0.25)
    assert error("dpmpp", 16) < error("ddim", 16)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 25) | st.sampled_from([61, 103, 122, 201]),  # where diffusers' trailing grid ends with t = -1
    st.sampled_from([1.0, 2.0]),
    st.none() | st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
    st.integers(1, 3),
)
def test_evaluations_are_those_that_sampling_asks_for(steps, guidance, interval, ensemble):
    point = Point(
        steps=steps,
        guidance=guidance,
        guidance_interval=None if interval is None else (interval[0] / 10, interval[1] / 10),
        ensemble=ensemble,
    )
    asked = []

    def denoise(x_t, t, guided):
        asked.append((int(t), guided))
        return x_t.repeat(2 if guided else 1, 1, 1, 1)

    scheduler = make_scheduler(BETAS, "x0", True)
    for _ in range(ensemble):
        sample_labels(denoise, scheduler, torch.zeros(1, 1, 1, 1), steps, guidance, [], interval=point.guidance_interval)
    assert point.evaluations == sum(1 + guided for _, guided in asked)
    timesteps = [t for t, _ in asked[:steps]]
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert timesteps[0] == 999
    assert timesteps[-1] >= 0
    if guidance != 1 and interval is not None:  # on the trailing grid a step starts at t / 1000 of the schedule
        assert all(guided == (interval[0] * 100 <= t + 1 <= interval[1] * 100) for t, guided in asked if (t + 1) % 100)


def test_guidance_is_equation_10_and_costs_two_evaluations():
    scheduler = make_scheduler(BETAS, "x0", True)
    calls = []

    def denoise(x_t, t, guided):
        calls.append(guided)
        conditional, unconditional = torch.full_like(x_t, 0.3), torch.full_like(x_t, 0.1)
        return torch.cat([conditional, unconditional]) if guided else conditional

    noise = torch.randn(1, 1, 2, 2)
    assert sample_labels(denoise, scheduler, noise, 1, 2.5, []).unique().item() == pytest.approx(0.1 + 2.5 * 0.2)
    assert sample_labels(denoise, scheduler, noise, 1, 1.0, []).unique().item() == pytest.approx(0.3)
    assert calls == [True, False]


def test_ddpm_noise_of_a_phrase_does_not_depend_on_its_batch():
    scheduler = make_scheduler(BETAS, "v", True)

    def run(phrases):
        generators = [phrase_generator(0, 1, "n", phrase, 8) for phrase in phrases]
        noise = draw_noise(generators, (1, 8, 8))
        return sample_labels(lambda x, t, g: 0.1 * x, scheduler, noise, 5, 1.0, generators, rule="ddpm")

    together, alone = run([1, 2, 3]), run([2])
    assert torch.equal(together[1], alone[0])


def test_the_task_loss_does_not_depend_on_the_label_scale_and_prefers_the_mask():
    mask = (torch.rand(3, 1, 8, 8) > 0.5).float()
    label = 2 * mask - 1
    assert torch.allclose(task_loss(0.1 * label, mask, 0.1), task_loss(label, mask, 1.0))
    assert torch.all(task_loss(label, mask, 1.0) < task_loss(0.5 * label, mask, 1.0))
    assert torch.all(task_loss(0.5 * label, mask, 1.0) < task_loss(-label, mask, 1.0))


def test_losses():
    logits = torch.tensor([[[[20.0, -20.0]]], [[[-20.0, 20.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 0.0]]]])
    right, wrong = discriminative_loss(logits, mask)
    assert right < 1e-6
    assert wrong > 20
    assert diffusion_loss(torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 3.0)).tolist() == [9.0, 9.0]
