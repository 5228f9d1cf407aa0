"""DDIM (Song et al. 2021) as a schedule of Gaussians: the family of Stable Diffusion samples by it."""

import json
import math

import torch
from diffusers import DDIMScheduler

from common.errors import UserError
from policy.gaussian import SMALLEST_STD, Schedule
from policy.noise_levels import NoiseLevels


def ddim_schedule(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """DDIM (Song et al. 2021, equations 12 and 16) with `steps` steps, timesteps as `scheduler` spaces them.

    Raises UserError if a step is not a Gaussian with a positive std (at an eta of 0: with none), or not one that is
    linear in x and the output.
    """
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"The scheduler's prediction_type is {config.prediction_type!r}, but this policy knows 'epsilon' and "
            "'v_prediction'; use a model trained to predict one of them."
        )
    if config.clip_sample or config.thresholding:
        name = "thresholding" if config.thresholding else "clip_sample"
        raise UserError(
            f"The scheduler has {name}=true, and a clipped sample is no longer Gaussian; "
            f'set "{name}": false in scheduler/scheduler_config.json, as Stable Diffusion has it.'
        )
    if not 1 <= steps < config.num_train_timesteps:
        raise UserError(
            f"sampling.steps={steps} is impossible with a model trained on {config.num_train_timesteps} timesteps; "
            f"choose 1 to {config.num_train_timesteps - 1}."
        )
    if not 0 <= eta <= 1:
        raise UserError(
            f"sampling.eta={eta:g} is impossible: above 1 DDIM's variance exceeds what there is; choose 1, or 0 for "
            "steps without noise."
        )
    schedule = _formulas(scheduler, steps, eta)
    if schedule is None:
        raise UserError(
            f"sampling.steps={steps} with steps_offset={config.steps_offset} leaves the {config.num_train_timesteps} "
            f"timesteps that the model was trained on; {_advice(scheduler, steps, eta)}."
        )
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        where = f"at timestep {timestep} (step {i} of {len(schedule)})"
        finite = math.isfinite(schedule.sample_scale[i].item() + schedule.output_scale[i].item())
        if not finite and not config.rescale_betas_zero_snr:
            raise UserError(
                f"Alpha is no number above 0 {where}; mend beta_start, beta_end or trained_betas in "
                "scheduler/scheduler_config.json."
            )
        if not finite:
            raise UserError(
                f"Alpha is 0 {where} and the picture all noise (from rescale_betas_zero_snr=true), so epsilon tells "
                'nothing of it; such a model predicts v: set "prediction_type": "v_prediction" in '
                "scheduler/scheduler_config.json if it does."
            )
        if eta and not schedule.std[i] >= SMALLEST_STD:
            raise UserError(
                f"The schedule's std is {schedule.std[i]:.2g} {where}, so that step has no log-prob (timestep_spacing="
                f"{config.timestep_spacing}, steps_offset={config.steps_offset}, set_alpha_to_one="
                f"{str(config.set_alpha_to_one).lower()}, sampling.eta={eta:g}); {_advice(scheduler, steps, eta)}."
            )
    return schedule


def ddpm_noise_levels(scheduler: DDIMScheduler) -> NoiseLevels:
    """The timesteps of training (Ho et al. 2020, equation 4) but one that is all noise, or none."""
    alphas = scheduler.alphas_cumprod.double()
    timesteps = torch.arange(len(alphas))[(alphas > 0) & (alphas < 1)]
    signal, noise_scale = alphas[timesteps].sqrt(), (1 - alphas[timesteps]).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return NoiseLevels(timesteps, signal, noise_scale, 1 / signal, -noise_scale / signal)
    return NoiseLevels(timesteps, signal, noise_scale, signal, -noise_scale)


def _formulas(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule | None:
    """As it follows from the formulas, fit for use or not; None if it leaves the timesteps that there are."""
    config = scheduler.config
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to("cpu", torch.int64)
    if config.steps_offset < 0 or timesteps.max() >= config.num_train_timesteps:
        return None
    previous = timesteps - config.num_train_timesteps // steps
    alphas = scheduler.alphas_cumprod.double()
    alpha = alphas[timesteps]
    alpha_prev = torch.where(previous >= 0, alphas[previous.clamp(min=0)], scheduler.final_alpha_cumprod.double())

    variance = eta**2 * (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    direction = (1 - alpha_prev - variance).clamp(min=0).sqrt()  # DDIM's "direction pointing to x_t", times epsilon
    if config.prediction_type == "epsilon":  # x0 = (x - sqrt(1 - alpha) output) / sqrt(alpha), epsilon = output
        sample_scale = (alpha_prev / alpha).sqrt()
        output_scale = direction - (alpha_prev * (1 - alpha) / alpha).sqrt()
    else:  # x0 = sqrt(alpha) x - sqrt(1 - alpha) output, epsilon = sqrt(alpha) output + sqrt(1 - alpha) x
        sample_scale = (alpha_prev * alpha).sqrt() + direction * (1 - alpha).sqrt()
        output_scale = direction * alpha.sqrt() - (alpha_prev * (1 - alpha)).sqrt()
    return Schedule(timesteps, sample_scale, output_scale, variance.sqrt())


# What is as Stable Diffusion has it and gives every step a std, in the order in which changes are advised.
REMEDIES: tuple[dict[str, object], ...] = (
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"steps_offset": 1, "set_alpha_to_one": False},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
)


def _advice(scheduler: DDIMScheduler, steps: int, eta: float) -> str:
    """What to set so that all steps are Gaussians, tried before it is said: the fewest changes that help."""
    for better_eta in dict.fromkeys((eta, 1.0)):
        for remedy in ({}, *REMEDIES):
            changes = {key: value for key, value in remedy.items() if scheduler.config[key] != value}
            changed = _formulas(DDIMScheduler.from_config(scheduler.config, **changes), steps, better_eta)
            if changed is not None and bool((changed.std >= SMALLEST_STD).all()):
                keys = " and ".join(f'"{key}": {json.dumps(value)}' for key, value in changes.items())
                parts = [f"set {keys} in scheduler/scheduler_config.json"] if changes else []
                return ", and ".join(parts + ["set sampling.eta=1"] * (better_eta != eta))
    return "neither sampling.eta=1 nor Stable Diffusion's offset and spacing helps: choose another model"
