"""What is measured of one batch, as plain numbers for the display, TensorBoard and metrics.jsonl."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from learner.batch import Batch
from learner.objectives.objective import StepResult
from learner.update import BaseKL

CLIP_GROUPS = 10  # curves of the clip fraction, at most


def reward_metrics(batch: Batch, batch_size: int, prompt_stds: dict[str, float]) -> dict[str, float]:
    """Of the batch as it came. prompt_stds: std of each prompt's remembered rewards."""
    metrics = {
        "reward/mean": float(batch.rewards.mean(dtype=np.float64)),
        "reward/std": float(batch.rewards.std(dtype=np.float64)),
        "age/mean": float(batch.ages.mean()),
        "age/max": float(batch.ages.max()),
        "age/in_flight": float(batch.ages_in_flight.mean()),
        "age/waiting": float((batch.ages - batch.ages_in_flight).mean()),
        "trajectories": float(len(batch)),
        "set_aside": float(batch_size - len(batch)),
    }
    known = [prompt_stds[prompt] for prompt in dict.fromkeys(batch.prompts) if prompt in prompt_stds]
    if known:
        metrics["reward/std_per_prompt"] = float(np.mean(known))
    means = {f"reward/{name}": _mean(values[np.isfinite(values)]) for name, values in batch.parts.items()}
    metrics |= {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return metrics


def update_metrics(steps: Sequence[StepResult], base: BaseKL | None) -> dict[str, float]:
    """Of the update, whatever the objective."""
    taken = [step for step in steps if step.taken]
    metrics = {
        "loss": _mean([step.loss for step in taken]),
        "grad_norm": _mean([step.grad_norm for step in taken]),
        "non_finite_steps": float(len(steps) - len(taken)),
    }
    if base is not None:
        metrics |= {"kl/base": base.trajectory, "kl/base_per_dimension": base.dimension}
    return finite(metrics)


def policy_gradient_metrics(batch: Batch, steps: Sequence[StepResult]) -> dict[str, float]:
    """Of ratios and what was clipped. A number that cannot be given (a gap where no row is of age 0) is nan."""
    first = steps[0]  # its pairs were seen before the batch's first update
    log_ratio = first.measured["log_ratio"]
    fresh = batch.ages[first.pairs.rows] == 0
    taken = [step for step in steps if step.taken]
    approx_kl = _mean([step.measured["approx_kl"].mean(dtype=np.float64) for step in taken])
    metrics = {
        "ratio/mean": float(np.exp(log_ratio, dtype=np.float64).mean()),
        "ratio/gap": float(np.abs(log_ratio[fresh]).max()) if fresh.any() else math.nan,
        "ratio/max_abs_log": float(np.abs(log_ratio).max()),
        "ratio/max_abs_log_true": float(np.abs(log_ratio).max()) * batch.dimensions,
        "ess/step": effective_sample_size(batch.dimensions * log_ratio.astype(np.float64)),
        "ess/trajectory": effective_sample_size(batch.dimensions * _sum_by_row(first)),
        "clip_fraction": _mean([step.measured["clipped"].mean() for step in taken]),
        "kl/step": approx_kl,
        "kl/step_true": approx_kl * batch.dimensions**2,
        **_clip_fractions(steps, taken),
    }
    return metrics


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """As plain numbers, whatever kind they are of, without those that are not finite."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2), a share between 1/n and 1 (Kish 1965); log_weights: true log-ratios, float64 [n]."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum() / len(weights))


def _sum_by_row(step: StepResult) -> np.ndarray:
    """float64 [trajectories of the optimizer step]: log-ratios summed over timesteps, all of which are in the step."""
    rows, places = np.unique(step.pairs.rows, return_inverse=True)
    return np.bincount(places, step.measured["log_ratio"].astype(np.float64), len(rows))


def _clip_fractions(steps: Sequence[StepResult], taken: Sequence[StepResult]) -> dict[str, float]:
    """Share of pairs clipped at each trained step, 0 the first; where there are more than ten, at a tenth of them."""
    count = 1 + max(int(step.pairs.steps.max()) for step in steps)
    groups = np.array_split(np.arange(count), min(count, CLIP_GROUPS))
    at = np.concatenate([step.pairs.steps for step in taken]) if taken else np.empty(0)
    clipped = np.concatenate([step.measured["clipped"] for step in taken]) if taken else np.empty(0)
    names = [f"{group[0]:02d}" if len(group) == 1 else f"{group[0]:02d}-{group[-1]:02d}" for group in groups]
    return {
        f"clip_fraction/step_{name}": _mean(clipped[np.isin(at, group)])
        for name, group in zip(names, groups, strict=True)
    }


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
