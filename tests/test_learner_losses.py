import math

import pytest
import torch

from conf.schema import Algorithm
from learner.losses import LOSSES, LossInputs, ddpo_is, ddpo_sf

CLIP = 0.1


def inputs(log_ratio: float, advantage: float) -> LossInputs:
    new = torch.tensor([log_ratio - 1.0], dtype=torch.float64, requires_grad=True)
    return LossInputs(new, torch.tensor([-1.0], dtype=torch.float64), torch.tensor([advantage]), CLIP)


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
