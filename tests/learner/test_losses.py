import math

import pytest
import torch
from learner.losses import LOSSES, LossInputs, ddpo_decoupled, ddpo_is, ddpo_sf

from conf.schema import Algorithm

CLIP = 0.1


def inputs(log_ratio: float, advantage: float, age: float = 0.0) -> LossInputs:
    """log_ratio: to the behaviour policy; age: the proximal policy's log-ratio to it."""
    new = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    return LossInputs(new, old, old + age, torch.tensor([advantage]), CLIP)


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
def test_ddpo_is_in_every_region(log_ratio: float, advantage: float, loss: float, slope: float) -> None:
    given = inputs(log_ratio, advantage)
    outputs = ddpo_is(given)
    outputs.loss.sum().backward()
    assert outputs.loss.item() == pytest.approx(loss)
    assert given.log_probs.grad is not None
    assert given.log_probs.grad.item() == pytest.approx(slope)
    assert outputs.ratio.item() == pytest.approx(math.exp(log_ratio))
    assert outputs.clipped.item() == (abs(math.exp(log_ratio) - 1) > CLIP)
    assert outputs.approx_kl.item() == pytest.approx(log_ratio**2 / 2)


@pytest.mark.parametrize("age", [-0.7, -0.05, 0.05, 0.7])
@pytest.mark.parametrize("moved", [-0.5, -0.05, 0.0, 0.05, 0.5])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_ddpo_decoupled_is_the_clipped_loss_against_the_proximal_policy_times_a_truncated_weight(
    age: float, moved: float, advantage: float
) -> None:
    given, fresh = inputs(age + moved, advantage, age), inputs(moved, advantage)
    outputs, plain = ddpo_decoupled(given), ddpo_is(fresh)
    outputs.loss.sum().backward()
    plain.loss.sum().backward()
    weight = min(math.exp(age), 1 + CLIP)
    assert outputs.loss.item() == pytest.approx(weight * plain.loss.item())
    assert given.log_probs.grad is not None and fresh.log_probs.grad is not None
    assert given.log_probs.grad.item() == pytest.approx(weight * fresh.log_probs.grad.item())
    assert outputs.ratio.item() == pytest.approx(math.exp(moved))
    assert outputs.clipped.item() == (abs(math.exp(moved) - 1) > CLIP)
    assert outputs.log_ratio.item() == pytest.approx(age + moved)  # to the policy that sampled


def test_on_fresh_data_the_decoupled_objective_is_the_plain_one() -> None:
    for moved in (-0.5, 0.0, 0.5):
        assert ddpo_decoupled(inputs(moved, 2.0)).loss == ddpo_is(inputs(moved, 2.0)).loss


@pytest.mark.parametrize("log_ratio", [-0.5, 0.0, 0.5])
def test_ddpo_sf_is_minus_advantage_times_log_prob_without_a_ratio(log_ratio: float) -> None:
    given = inputs(log_ratio, 3.0)
    outputs = ddpo_sf(given)
    outputs.loss.sum().backward()
    assert outputs.loss.item() == pytest.approx(-3 * (log_ratio - 1))
    assert given.log_probs.grad is not None
    assert given.log_probs.grad.item() == -3


def test_every_algorithm_of_the_config_has_a_loss() -> None:
    assert set(LOSSES) == set(Algorithm)
