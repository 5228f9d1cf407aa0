"""Objectives: their losses against closed forms, which pairs they draw, and what is measured of those."""

import dataclasses
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from conf.schema import Config, LearnerConfig
from learner.objectives.ddpo import Decoupled, ImportanceSampling, LogProbs, PolicyGradient, ScoreFunction
from learner.objectives.objective import Pairs, StepResult
from learner.paths import OBJECTIVES
from learner.registry import make_objective
from tests.learner.learner_toy import SHAPE, GaussianToy, toy_batch

CLIP = 0.1


def objective(kind: type[PolicyGradient], **settings: Any) -> PolicyGradient:
    return kind(LearnerConfig(**{"clip_range": CLIP, **settings}), seed=0)


def inputs(log_ratio: float, age: float = 0.0) -> LogProbs:
    """log_ratio: to the behaviour policy; age: the proximal policy's log-ratio to it."""
    new = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    return LogProbs(new, old, old + age)


def loss_and_slope(kind: type[PolicyGradient], given: LogProbs, advantage: float) -> tuple[float, float, float]:
    """Loss, its derivative by the log-prob, and the log-ratio that is clipped."""
    loss, log_ratio = objective(kind).of(given, torch.tensor([advantage]))
    loss.sum().backward()
    assert given.new.grad is not None
    return loss.item(), given.new.grad.item(), log_ratio.item()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "slope"),
    [
        (0.0, 2.0, -2.0, -2.0),
        (0.05, 2.0, -2 * math.exp(0.05), -2 * math.exp(0.05)),
        (0.5, 2.0, -2 * 1.1, 0.0),  # good and already more likely: no further
        (-0.5, 2.0, -2 * math.exp(-0.5), -2 * math.exp(-0.5)),  # good and less likely: back, however far
        (-0.5, -2.0, 2 * 0.9, 0.0),  # bad and already less likely: no further
        (0.5, -2.0, 2 * math.exp(0.5), 2 * math.exp(0.5)),  # bad and more likely: back
    ],
)
def test_importance_sampling_in_every_region(log_ratio: float, advantage: float, loss: float, slope: float) -> None:
    assert loss_and_slope(ImportanceSampling, inputs(log_ratio), advantage) == pytest.approx((loss, slope, log_ratio))


@pytest.mark.parametrize("age", [-0.7, -0.05, 0.05, 0.7])
@pytest.mark.parametrize("moved", [-0.5, -0.05, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_decoupled_is_the_clipped_loss_against_the_proximal_policy_times_a_truncated_weight(
    age: float, moved: float, advantage: float
) -> None:
    loss, slope, log_ratio = loss_and_slope(Decoupled, inputs(age + moved, age), advantage)
    plain, plain_slope, _ = loss_and_slope(ImportanceSampling, inputs(moved), advantage)
    weight = min(math.exp(age), 1 + CLIP)
    assert (loss, slope, log_ratio) == pytest.approx((weight * plain, weight * plain_slope, moved))


def test_on_fresh_data_the_decoupled_objective_is_the_plain_one() -> None:
    for moved in (-0.5, 0.0, 0.5):
        decoupled, plain = (loss_and_slope(kind, inputs(moved), 2.0) for kind in (Decoupled, ImportanceSampling))
        assert decoupled == plain


@pytest.mark.parametrize("log_ratio", [-0.5, 0.0, 0.5])
def test_the_score_function_is_minus_advantage_times_log_prob_without_a_ratio(log_ratio: float) -> None:
    loss, slope, clipped = loss_and_slope(ScoreFunction, inputs(log_ratio), 3.0)
    assert (loss, clipped) == pytest.approx((-3 * (log_ratio - 1), log_ratio))
    assert slope == -3


@pytest.mark.parametrize("kind", [ImportanceSampling, ScoreFunction, Decoupled])
def test_what_is_measured_of_each_pair(kind: type[PolicyGradient]) -> None:
    """log_ratio is to the policy that sampled; ratio, clipped and approx_kl are of the one that is clipped against."""
    moved = torch.full(SHAPE, 0.3, dtype=torch.float64)
    sampled, policy = GaussianToy(torch.zeros_like(moved), [0.9, 0.5]), GaussianToy(moved, [0.9, 0.5])
    batch, chosen = toy_batch(sampled, 3), Pairs(np.array([2, 0, 2]), np.array([1, 0, 0]))
    made, proximal = objective(kind), GaussianToy(moved / 2, [0.9, 0.5])
    before = made.before(proximal, batch, chosen)
    assert (before is not None) == (kind is Decoupled)
    pairs = chosen if before is None else replace(chosen, before=before.detach().numpy())
    outputs = made.loss(policy, batch, pairs, torch.ones(3))
    assert set(outputs) == {"loss", *made.measures}

    def log_prob(of: GaussianToy) -> Tensor:
        x, x_next = (torch.from_numpy(batch.latents[chosen.rows, chosen.steps + place]) for place in (0, 1))
        return of.log_prob(x, x_next, torch.from_numpy(chosen.steps), of.encode([""] * 3)).detach()

    old = torch.from_numpy(batch.log_probs[chosen.rows, chosen.steps])
    clipped_ratio = log_prob(policy) - (log_prob(proximal) if kind is Decoupled else old)
    expected = {
        "log_ratio": log_prob(policy) - old,
        "ratio": clipped_ratio.exp(),
        "clipped": (clipped_ratio.exp() - 1).abs() > CLIP,
        "approx_kl": clipped_ratio**2 / 2,
    }
    for name, values in expected.items():
        torch.testing.assert_close(outputs[name], values)
    log_probs = LogProbs(log_prob(policy), old, log_prob(proximal) if kind is Decoupled else old)
    torch.testing.assert_close(outputs["loss"], made.of(log_probs, torch.ones(3, dtype=torch.float64))[0])


# ---- which pairs


@pytest.mark.parametrize("kind", [ImportanceSampling, ScoreFunction, Decoupled])
def test_only_the_first_train_steps_are_drawn(kind: type[PolicyGradient]) -> None:
    batch = toy_batch(GaussianToy(torch.zeros(SHAPE), [0.5] * 6), 5)
    for count, trained in ((2, 2), (6, 6), (None, 6)):
        shares = objective(kind, train_steps=count, optimizer_steps=2).draw(batch)
        pairs = [pair for share in shares for pair in zip(share.rows, share.steps, strict=True)]
        assert sorted(pairs) == [(row, step) for row in range(5) for step in range(trained)]


def test_metrics_are_of_the_steps_that_are_trained_on() -> None:
    batch = toy_batch(GaussianToy(torch.zeros(SHAPE), [0.5] * 6), 5)
    made = objective(ImportanceSampling, train_steps=2, optimizer_steps=1)
    (pairs,) = made.draw(batch)
    log_ratio = np.where(pairs.steps == 1, 0.2, 0.1)
    measured = {"log_ratio": log_ratio, "clipped": log_ratio > CLIP + 0.05, "approx_kl": log_ratio**2 / 2}
    metrics = made.metrics(batch, [StepResult(pairs, True, 0.0, 0.0, measured)])
    assert {name for name in metrics if name.startswith("clip_fraction/")} == {
        "clip_fraction/step_00",
        "clip_fraction/step_01",
    }
    assert (metrics["clip_fraction/step_00"], metrics["clip_fraction/step_01"], metrics["clip_fraction"]) == (0, 1, 0.5)
    assert metrics["ess/trajectory"] == pytest.approx(1)  # all trajectories have 0.3, summed over the two steps
    assert metrics["ess/step"] < 1


# ---- by name


def settings(**learner: Any) -> Config:
    return dataclasses.replace(Config(), learner=LearnerConfig(**{"optimizer_steps": 1, **learner}))


def test_every_name_makes_its_objective_and_the_age_of_the_data_chooses_where_none_is_given() -> None:
    for name, path in OBJECTIVES.built_in.items():
        made = make_objective(settings(objective=name))
        assert f"{type(made).__module__}:{type(made).__name__}" == path
    for age, kind in ((0, ImportanceSampling), (1, ImportanceSampling), (2, Decoupled), (8, Decoupled)):
        config = settings(optimizer_steps=2)
        config.buffer.max_staleness = age
        assert type(make_objective(config)) is kind
        config.learner.objective = "ddpo_is"
        assert type(make_objective(config)) is ImportanceSampling


def test_a_penalty_that_an_objective_does_not_have_is_refused() -> None:
    path = "tests.workers.clean_objective:Regression"
    with pytest.raises(UserError, match=rf"learner.kl_weight=0.1 with learner.objective={path}, whose loss has no pen"):
        make_objective(settings(objective=path, objective_args={"timestep": 500}, kl_weight=0.1))


def test_a_weight_by_step_that_is_not_there_is_refused() -> None:
    config = settings(objective_args={"step_weight": "sigma"})
    with pytest.raises(UserError, match="step_weight='sigma' is none of equal, std, output: choose one"):
        make_objective(config)


@pytest.mark.parametrize(
    ("steps", "age", "says"),
    [
        (2, 0, "learner.objective=ddpo_sf with learner.optimizer_steps=2: "),
        (1, 1, "learner.objective=ddpo_sf with buffer.max_staleness=1: "),
        (2, 3, "learner.objective=ddpo_sf with buffer.max_staleness=3: "),
    ],
)
def test_the_score_function_is_refused_where_data_are_not_fresh(steps: int, age: int, says: str) -> None:
    config = settings(objective="ddpo_sf", optimizer_steps=steps)
    config.buffer.max_staleness = age
    with pytest.raises(UserError) as refused:
        make_objective(config)
    assert str(refused.value).startswith(says) and "or take ddpo_is" in str(refused.value)
    config.buffer.max_staleness, config.learner.optimizer_steps = 0, 1
    assert isinstance(make_objective(config), ScoreFunction)
