"""One denoising step as a Gaussian, in pure functions.

DDPO reads the denoising chain as an MDP (Black et al. 2023, section 4.2): the action of step i is the next latent, and

    p(x_next | x, c) = N(x_next; mean, std^2 I),    mean = sample_scale[i] * x + output_scale[i] * network(x, t_i, c).

Every sampler that this project knows is linear in x and in the network's output, so a schedule is three numbers a
step. They are computed once in float64, and neither the rollout nor the learner knows from which sampler they came.
"""

import json
import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from common.errors import UserError

SMALLEST_STD = 1e-4  # below it float32's rounding of the mean (1e-7) moves the log-prob by more than the clip range


@dataclass(frozen=True)
class Schedule:
    """The Gaussians of T denoising steps; step i goes from x at timesteps[i] to the next latent.

    Example: Stable Diffusion with 50 steps and eta 1 has timesteps 981, 961, ..., 1 and std 0.454, ..., 0.0206.
    """

    timesteps: Tensor  # int64 [T], as the network is told them
    sample_scale: Tensor  # float64 [T]
    output_scale: Tensor  # float64 [T]
    std: Tensor  # float64 [T], all positive

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: str) -> "Schedule":
        return Schedule(
            *(tensor.to(device) for tensor in (self.timesteps, self.sample_scale, self.output_scale, self.std))
        )


def ddim_schedule(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule:
    """DDIM (Song et al. 2021, equations 12 and 16) with `steps` steps, timesteps as `scheduler` spaces them.

    Raises UserError if a step is not a Gaussian with a positive std, or not one that is linear in x and the output.
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
    if not 0 < eta <= 1:
        raise UserError(
            f"sampling.eta={eta:g} gives no policy gradient: at 0 the std of every step is 0 and the log-prob NaN, "
            "above 1 DDIM's variance exceeds what there is; choose 0 < sampling.eta <= 1."
        )
    schedule = _schedule(scheduler, steps, eta)
    if schedule is None:
        raise UserError(
            f"sampling.steps={steps} with steps_offset={config.steps_offset} leaves the {config.num_train_timesteps} "
            f"timesteps that the model was trained on; {_advice(scheduler, steps, eta)}."
        )
    for i, timestep in enumerate(schedule.timesteps.tolist()):
        where = f"at timestep {timestep} (step {i} of {len(schedule)})"
        if not math.isfinite(schedule.sample_scale[i].item() + schedule.output_scale[i].item()):
            raise UserError(
                f"Alpha is 0 {where} and the picture all noise (from rescale_betas_zero_snr=true), so epsilon tells "
                'nothing of it; such a model predicts v: set "prediction_type": "v_prediction" in '
                "scheduler/scheduler_config.json if it does."
            )
        if not schedule.std[i] >= SMALLEST_STD:
            raise UserError(
                f"The schedule's std is {schedule.std[i]:.2g} {where}, so that step has no log-prob (timestep_spacing="
                f"{config.timestep_spacing}, steps_offset={config.steps_offset}, set_alpha_to_one="
                f"{str(config.set_alpha_to_one).lower()}, sampling.eta={eta:g}); {_advice(scheduler, steps, eta)}."
            )
    return schedule


def _schedule(scheduler: DDIMScheduler, steps: int, eta: float) -> Schedule | None:
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
            changed = _schedule(DDIMScheduler.from_config(scheduler.config, **changes), steps, better_eta)
            if changed is not None and bool((changed.std >= SMALLEST_STD).all()):
                keys = " and ".join(f'"{key}": {json.dumps(value)}' for key, value in changes.items())
                parts = [f"set {keys} in scheduler/scheduler_config.json"] if changes else []
                return ", and ".join(parts + ["set sampling.eta=1"] * (better_eta != eta))
    return "neither sampling.eta=1 nor Stable Diffusion's offset and spacing helps: choose another model"


def step(schedule: Schedule, x: Tensor, output: Tensor, step_index: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [n,C,H,W] and std [n,1,1,1] of each row's next latent, in the dtype of `x`.

    x: float32 or float64 [n,C,H,W]; output: the (guided) network's output, same shape and dtype; step_index: int64
    [n], each row at a step of its own; all on the schedule's device.
    """

    def rows(values: Tensor) -> Tensor:
        return values[step_index].to(x.dtype)[:, None, None, None]

    return rows(schedule.sample_scale) * x + rows(schedule.output_scale) * output, rows(schedule.std)


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of `x_next` [n,C,H,W] under N(mean, std^2 I): its **mean** over C,H,W, [n], in the dtype of `mean`.

    The mean and not the sum, as in the paper's public code: the clip range of 1e-4 is meant on this scale, and the
    true log-prob is this times C*H*W.
    """
    log_density = -0.5 * ((x_next - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.mean(dim=(1, 2, 3))
