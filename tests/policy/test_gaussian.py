"""A denoising step as a Gaussian: against the closed form, against diffusers, and what is refused."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from policy.ddim import ddim_schedule
from policy.gaussian import log_prob, step
from tests.pipelines import SD_DDIM


def scheduler(**changes: object) -> DDIMScheduler:
    return DDIMScheduler.from_config({key: value for key, value in (SD_DDIM | changes).items() if key[0] != "_"})


def test_std_of_stable_diffusion_with_50_steps() -> None:
    schedule = ddim_schedule(scheduler(), steps=50, eta=1.0)
    std = dict(zip(schedule.timesteps.tolist(), schedule.std.tolist(), strict=True))
    assert len(schedule) == 50 and list(std)[:2] == [981, 961] and list(std)[-1] == 1
    for timestep, expected in {981: 0.454, 481: 0.288, 41: 0.100, 21: 0.039}.items():
        assert std[timestep] == pytest.approx(expected, abs=5e-4)
    assert std[1] == pytest.approx(0.0206, abs=5e-5)


def test_mean_is_the_papers_formula() -> None:
    schedule = ddim_schedule(scheduler(), steps=50, eta=0.7)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    x, epsilon = torch.randn(2, 50, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = step(schedule, x, epsilon, torch.arange(50))
    for i, t in enumerate(range(981, 0, -20)):
        alpha, alpha_prev = alphas[t], alphas[max(t - 20, 0)]
        sigma = 0.7 * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        predicted_x0 = (x[i] - (1 - alpha).sqrt() * epsilon[i]) / alpha.sqrt()
        expected = alpha_prev.sqrt() * predicted_x0 + (1 - alpha_prev - sigma**2).sqrt() * epsilon[i]
        assert std[i].item() == pytest.approx(sigma, rel=1e-4)  # diffusers' alphas are float32
        assert mean[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(2, 120),
    eta=st.just(0.0) | st.floats(0.05, 1.0),
    prediction_type=st.sampled_from(["epsilon", "v_prediction"]),
    spacing=st.sampled_from(["leading", "trailing"]),
    data=st.data(),
)
def test_step_is_that_of_diffusers(
    steps: int, eta: float, prediction_type: str, spacing: str, data: st.DataObject
) -> None:
    reference = scheduler(prediction_type=prediction_type, timestep_spacing=spacing)
    schedule = ddim_schedule(reference, steps, eta)
    i = data.draw(st.integers(0, steps - 1))
    x, output, noise = torch.randn(
        3, 2, 4, 3, 5, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    mean, std = step(schedule, x, output, torch.full((2,), i))
    expected = reference.step(output, schedule.timesteps[i], x, eta=eta, variance_noise=noise).prev_sample
    # in diffusers' float32, x / sqrt(alpha) and epsilon / sqrt(alpha) are up to 15 times larger than their difference
    torch.testing.assert_close(mean + std * noise, expected, rtol=1e-5, atol=3e-5)


def test_every_row_may_be_at_a_step_of_its_own() -> None:
    schedule = ddim_schedule(scheduler(), steps=10, eta=1.0)
    x, output = torch.randn(2, 10, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([3, 0, 9, 9, 1, 2, 5, 7, 4, 0])
    mean, std = step(schedule, x, output, index)
    for row, i in enumerate(index):
        alone_mean, alone_std = step(schedule, x[row : row + 1], output[row : row + 1], i[None])
        assert torch.equal(mean[row], alone_mean[0]) and torch.equal(std[row], alone_std[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_is_the_mean_of_the_normal_log_density(dtype: torch.dtype) -> None:
    mean, x = torch.randn(2, 6, 4, 3, 5, dtype=dtype, generator=torch.Generator().manual_seed(0))
    std = torch.linspace(0.02, 1, 6, dtype=dtype)[:, None, None, None]
    value = log_prob(mean + std * x, mean, std)
    expected = torch.distributions.Normal(mean, std).log_prob(mean + std * x).mean(dim=(1, 2, 3))
    assert value.dtype == dtype and value.shape == (6,)
    torch.testing.assert_close(value, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)


def test_log_prob_at_the_smallest_std_is_about_two_and_a_half() -> None:
    noise = torch.randn(8, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    std = ddim_schedule(scheduler(), steps=50, eta=1.0).std[-1:].float()[:, None, None, None]
    torch.testing.assert_close(
        log_prob(std * noise, torch.zeros_like(noise), std), torch.full((8,), 2.46), atol=0.05, rtol=0
    )


REFUSED = [
    ({"steps_offset": 0}, 50, 1.0, "steps_offset=0"),
    ({"set_alpha_to_one": True}, 50, 1.0, "set_alpha_to_one=true"),
    ({"timestep_spacing": "linspace"}, 50, 1.0, "timestep_spacing=linspace"),
    ({"steps_offset": 0, "prediction_type": "v_prediction"}, 10, 1.0, "steps_offset=0"),
    ({}, 50, 1e-3, "sampling.eta=0.001"),
    ({}, 50, 1.5, "sampling.eta=1.5"),
    ({}, 50, -1.0, "sampling.eta=-1"),
    ({}, 50, math.nan, "sampling.eta=nan"),
    ({}, 0, 1.0, "sampling.steps=0"),
    ({}, 1000, 1.0, "sampling.steps=1000"),
    ({"steps_offset": 30}, 999, 1.0, "steps_offset=30"),
    ({"clip_sample": True}, 50, 1.0, "clip_sample"),
    ({"thresholding": True}, 50, 1.0, "thresholding"),
    ({"prediction_type": "sample"}, 50, 1.0, "'sample'"),
    ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 50, 1.0, "rescale_betas_zero_snr"),
]


@pytest.mark.parametrize(("changes", "steps", "eta", "names"), REFUSED)
def test_what_is_no_gaussian_with_a_std_is_refused(changes: dict, steps: int, eta: float, names: str) -> None:
    with pytest.raises(UserError) as refusal:
        ddim_schedule(scheduler(**changes), steps, eta)
    assert names in str(refusal.value) and "\n" not in str(refusal.value)


def test_zero_terminal_snr_is_a_gaussian_for_a_model_that_predicts_v() -> None:
    reference = scheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    schedule = ddim_schedule(reference, steps=50, eta=1.0)
    assert schedule.timesteps[0] == 999 and torch.isfinite(schedule.output_scale).all() and (schedule.std > 0).all()
