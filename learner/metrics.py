"""What is measured of one batch, as plain numbers for the display, TensorBoard and metrics.jsonl."""

import math
from collections.abc import Sequence

import numpy as np

from learner.batch import Batch
from learner.update import BaseKL, StepResult


def reward_metrics(batch: Batch, batch_size: int, prompt_stds: dict[str, float]) -> dict[str, float]:
    """Of the batch as it came. prompt_stds: std of each prompt's remembered rewards."""
    metrics = {
        "reward/mean": float(batch.rewards.mean(dtype=np.float64)),
        "reward/std": float(batch.rewards.std(dtype=np.float64)),
        "age/mean": float(batch.ages.mean()),
        "age/max": float(batch.ages.max()),
        "trajectories": float(len(batch)),
        "set_aside": float(batch_size - len(batch)),
    }
    known = [prompt_stds[prompt] for prompt in dict.fromkeys(batch.prompts) if prompt in prompt_stds]
    if known:
        metrics["reward/std_per_prompt"] = float(np.mean(known))
    means = {f"reward/{name}": _mean(values[np.isfinite(values)]) for name, values in batch.parts.items()}
    metrics |= {name: mean for name, mean in means.items() if math.isfinite(mean)}
    return metrics


def update_metrics(batch: Batch, steps: Sequence[StepResult], base: BaseKL) -> dict[str, float]:
    """Of the update. A number that cannot be given (a gap where no row is of age 0; not finite) is left out."""
    first = steps[0]  # its pairs were seen before the batch's first update
    fresh = batch.ages[first.pairs.rows] == 0
    taken = [step for step in steps if step.taken]
    approx_kl = _mean([step.approx_kl.mean(dtype=np.float64) for step in taken])
    metrics = {
        "ratio/mean": float(first.ratio.mean(dtype=np.float64)),
        "ratio/gap": float(np.abs(first.log_ratio[fresh]).max()) if fresh.any() else math.nan,
        "ratio/max_abs_log": float(np.abs(first.log_ratio).max()),
        "ratio/max_abs_log_true": float(np.abs(first.log_ratio).max()) * batch.dimensions,
        "loss": _mean([step.loss for step in taken]),
        "clip_fraction": _mean([step.clipped.mean() for step in taken]),
        "kl/step": approx_kl,
        "kl/step_true": approx_kl * batch.dimensions**2,
        "grad_norm": _mean([step.grad_norm for step in taken]),
        "kl/base": base.trajectory,
        "kl/base_per_dimension": base.dimension,
        "non_finite_steps": float(len(steps) - len(taken)),
    }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else math.nan
