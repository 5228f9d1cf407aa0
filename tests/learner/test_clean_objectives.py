"""Losses on clean pictures against closed forms, on a policy whose output is one parameter wherever it is asked.

The toy is a flow model: x = (1 - sigma) clean + sigma noise, and its output is to be noise - clean.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from conf.schema import Config, LearnerConfig
from learner.batch import Batch
from learner.objectives.awm import AdvantageWeightedMatching
from learner.objectives.clean import FINENESS, NOISE, CleanPictures
from learner.objectives.nft import NegativeAware
from learner.objectives.objective import STREAM, Pairs
from learner.objectives.rwr import RewardWeighted, RewardWeightedSparse
from learner.registry import make_objective
from learner.update import Updater
from policy.ddim import ddpm_noise_levels
from policy.noise_levels import NoiseLevels
from tests.learner.learner_toy import SHAPE, D, GaussianToy, toy_batch
from tests.policy.test_gaussian import scheduler

THETA = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64).reshape(SHAPE)
SEED, ALL = 5, [RewardWeighted, RewardWeightedSparse, NegativeAware, AdvantageWeightedMatching]


def config(**changes: Any) -> LearnerConfig:
    return LearnerConfig(**{"optimizer_steps": 1, "lr": 0.02, "weight_decay": 0.0, "max_grad_norm": 1e9, **changes})


def toy(theta: torch.Tensor = THETA) -> GaussianToy:
    return GaussianToy(theta, [0.5])


def batch_of(count: int, rewards: np.ndarray | None = None) -> Batch:
    batch = toy_batch(toy(), count)
    return batch if rewards is None else dataclasses.replace(batch, rewards=rewards.astype(np.float32))


def normal(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=count).astype(np.float32)


def gradient(
    made: CleanPictures, policy: GaussianToy, batch: Batch, advantages: np.ndarray, microbatch: int = 1000
) -> tuple[Pairs, np.ndarray]:
    """The only optimizer step's pairs, and the gradient of their mean loss."""
    updater = Updater(policy, made, made.config)
    (drawn,) = made.draw(batch)
    pairs = updater._with_before(batch, drawn)
    updater.gradient(batch, advantages, pairs, microbatch)
    assert policy.theta.grad is not None
    return pairs, policy.theta.grad.numpy()


def seen(batch: Batch, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """clean, noise [n,C,H,W] and sigma [n,1,1,1] of each pair, by hand."""
    keys = [(SEED, STREAM, batch.number, NOISE, row, step) for row, step in zip(pairs.rows, pairs.steps, strict=True)]
    noise = np.stack([np.random.default_rng(key).standard_normal(SHAPE) for key in keys])
    sigma = toy().noise_levels.noise_scale.numpy()[pairs.steps * 3 // FINENESS]
    return batch.latents[pairs.rows, -1], noise, sigma[:, None, None, None]


# ---- the forward process


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_what_an_output_says_are_those_of_ddpm(prediction_type: str) -> None:
    made = scheduler(prediction_type=prediction_type)
    levels, generator = ddpm_noise_levels(made), torch.Generator().manual_seed(0)
    assert len(levels) == 1000 and levels.timesteps.tolist() == list(range(1000))
    level = torch.tensor([0, 1, 500, 999])
    clean, noise = torch.randn((2, 4, *SHAPE), generator=generator, dtype=torch.float64)
    x = levels.noised(clean, noise, level)
    torch.testing.assert_close(x, made.add_noise(clean, noise, level), rtol=1e-5, atol=1e-6)  # diffusers' is float32
    wanted = noise if prediction_type == "epsilon" else made.get_velocity(clean, noise, level)
    torch.testing.assert_close(levels.output(x, clean, level), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(levels.clean(x, levels.output(x, clean, level), level), clean)


def test_a_level_that_is_all_noise_is_left_out() -> None:
    levels = ddpm_noise_levels(scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert len(levels) == 999 and (levels.signal > 0).all()


def test_a_flow_models_output_is_noise_minus_clean() -> None:
    levels: NoiseLevels = toy().noise_levels
    clean, noise, level = torch.randn(3, *SHAPE).double(), torch.randn(3, *SHAPE).double(), torch.arange(3)
    x = levels.noised(clean, noise, level)
    torch.testing.assert_close(levels.output(x, clean, level), noise - clean)
    torch.testing.assert_close(levels.clean(x, noise - clean, level), clean)


# ---- which pairs


@pytest.mark.parametrize("kind", ALL)
def test_every_picture_comes_once_a_pass_at_each_of_its_levels(kind: type[CleanPictures]) -> None:
    batch = batch_of(20, np.arange(20))
    made = kind(config(optimizer_steps=2), SEED, levels=4, passes=3)
    shares = made.draw(batch)
    assert len(shares) == 6
    trained = [18, 19] if kind is RewardWeightedSparse else list(range(20))
    for first, second in zip(shares[::2], shares[1::2], strict=True):
        assert sorted([*first.rows, *second.rows]) == sorted(trained * 4)
        assert not set(first.rows) & set(second.rows)
    steps = np.concatenate([share.steps for share in shares])
    assert (steps >= 0).all() and (steps < FINENESS).all() and len(set(steps)) == len(steps)
    again = kind(config(optimizer_steps=2), SEED, levels=4, passes=3).draw(batch)
    assert all(np.array_equal(one.steps, other.steps) for one, other in zip(shares, again, strict=True))


def test_levels_are_drawn_evenly() -> None:
    (pairs,) = RewardWeighted(config(), SEED, levels=50).draw(batch_of(60))
    counts = np.bincount(pairs.steps * 3 // FINENESS, minlength=3)
    assert len(counts) == 3 and (np.abs(counts - 1000) < 5 * np.sqrt(1000 * 2 / 3)).all()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("microbatch", [1, 7])
def test_the_gradient_is_the_same_for_every_microbatch(kind: type[CleanPictures], microbatch: int) -> None:
    batch, made = batch_of(20), kind(config(kl_weight=0.3, clip_range=1.0), SEED)
    _, whole = gradient(made, toy(), batch, normal(20))
    _, parts = gradient(made, toy(), batch, normal(20), microbatch)
    assert np.abs(whole).max() > 1e-3
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


# ---- losses


@pytest.mark.parametrize("within_prompt", [False, True])
def test_reward_weighted_regression_is_the_closed_form(within_prompt: bool) -> None:
    batch = batch_of(12, np.linspace(-9, 5, 12))
    made = RewardWeighted(config(), SEED, temperature=0.2, within_prompt=within_prompt)
    weights = np.empty(12)
    for prompt in range(3):
        group = np.arange(12) % 3 == prompt if within_prompt else np.arange(12) >= 0
        shares = np.exp(0.2 * batch.rewards[group].astype(np.float64))
        weights[group] = group.sum() * shares / shares.sum()
    np.testing.assert_allclose(made.weights(batch), weights, rtol=1e-12)
    pairs, found = gradient(made, toy(), batch, normal(12))
    clean, noise, _ = seen(batch, pairs)
    by_pair = weights[pairs.rows][:, None, None, None] * 2 * (THETA.numpy() - (noise - clean)) / D
    np.testing.assert_allclose(found, by_pair.mean(axis=0), rtol=1e-12)


def test_the_sparse_one_trains_on_the_best_tenth_alone() -> None:
    batch = batch_of(30, np.random.default_rng(3).permutation(30))
    made = RewardWeightedSparse(config(), SEED)
    pairs, found = gradient(made, toy(), batch, normal(30))
    assert set(batch.rewards[pairs.rows]) == {27.0, 28.0, 29.0}
    clean, noise, _ = seen(batch, pairs)
    np.testing.assert_allclose(found, (2 * (THETA.numpy() - (noise - clean)) / D).mean(axis=0), rtol=1e-12)
    assert RewardWeightedSparse(config(), SEED).rows(batch_of(3)).shape == (1,)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_at_the_old_policy_pulls_to_good_pictures_and_away_from_bad_ones(beta: float) -> None:
    """There the two errors are one, and the gradient is (2r - 1) times that of the error of good pictures."""
    batch, advantages = batch_of(20), np.linspace(-7, 7, 20).astype(np.float32)
    pairs, found = gradient(NegativeAware(config(), SEED, beta=beta), toy(), batch, advantages)
    clean, noise, sigma = seen(batch, pairs)
    x = (1 - sigma) * clean + sigma * noise
    difference = x - sigma * THETA.numpy() - clean
    scale = np.abs(difference).mean(axis=(1, 2, 3), keepdims=True)
    good = np.clip(advantages / 10 + 0.5, 0, 1)[pairs.rows][:, None, None, None]
    by_pair = (2 * good - 1) * 2 * difference * -sigma / scale / D
    np.testing.assert_allclose(found, by_pair.mean(axis=0), rtol=1e-6)  # advantages are float32
    _, none = gradient(NegativeAware(config(), SEED), toy(), batch, np.zeros(20, np.float32))
    assert np.abs(none).max() < 1e-12 < np.abs(found).max()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_after_a_step_is_the_formula(beta: float) -> None:
    batch, advantages = batch_of(20), np.linspace(-7, 7, 20).astype(np.float32)
    policy, made = toy(), NegativeAware(config(), SEED, beta=beta)
    updater = Updater(policy, made, made.config)
    pairs = updater._with_before(batch, made.draw(batch)[0])
    moved = toy(THETA + 0.2)
    found = made.loss(moved, batch, pairs, torch.from_numpy(advantages[pairs.rows]))["loss"].detach().numpy()
    clean, noise, sigma = seen(batch, pairs)
    x = (1 - sigma) * clean + sigma * noise
    old, new = x - sigma * THETA.numpy(), x - sigma * (THETA.numpy() + 0.2)
    errors = []
    for difference in (beta * new + (1 - beta) * old - clean, (1 + beta) * old - beta * new - clean):
        errors.append((difference**2).mean(axis=(1, 2, 3)) / np.abs(difference).mean(axis=(1, 2, 3)))
    good = np.clip(advantages / 10 + 0.5, 0, 1)[pairs.rows]
    np.testing.assert_allclose(found, (good * errors[0] + (1 - good) * errors[1]) / beta, rtol=1e-6)


@pytest.mark.parametrize(("moved", "advantage", "slope"), [(0.0, 2.0, 1), (3.0, -2.0, 0), (3.0, 2.0, 1)])
def test_advantage_weighted_matching_is_a_clipped_ratio_of_errors(moved: float, advantage: float, slope: int) -> None:
    """Far from the old policy the errors are large and the ratio near 0: bad pictures go no further, good ones back."""
    batch, made = batch_of(6), AdvantageWeightedMatching(config(clip_range=0.1), SEED)
    updater = Updater(toy(), made, made.config)
    pairs = updater._with_before(batch, made.draw(batch)[0])
    policy = toy(THETA + moved)
    Updater(policy, made, made.config).gradient(batch, np.full(6, advantage, np.float32), pairs, 1000)
    clean, noise, _ = seen(batch, pairs)
    target = noise - clean
    old, new = (((theta - target) ** 2).mean(axis=(1, 2, 3)) for theta in (THETA.numpy(), THETA.numpy() + moved))
    ratio = np.exp(old - new)
    assert moved == 0 or (ratio < 0.9).all()
    by_pair = (slope * advantage * ratio)[:, None, None, None] * 2 * (THETA.numpy() + moved - target) / D
    assert policy.theta.grad is not None
    np.testing.assert_allclose(policy.theta.grad.numpy(), by_pair.mean(axis=0), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_the_pull_is_to_the_outputs_of_the_base(kind: type[CleanPictures]) -> None:
    batch, advantages = batch_of(20), normal(20)
    _, without = gradient(kind(config(), SEED), toy(), batch, advantages)
    _, pulled = gradient(kind(config(kl_weight=0.7), SEED), toy(), batch, advantages)
    np.testing.assert_allclose(pulled - without, 0.7 * 2 * THETA.numpy() / D, rtol=1e-9)  # the toy's base is at 0


def test_of_two_pictures_the_policy_moves_to_the_one_that_is_rewarded_as_the_closed_form_says() -> None:
    """The optimum of the same drawn pairs: the mean of their targets, by weight."""
    batch, made = batch_of(2, np.array([0.0, 20.0])), RewardWeighted(config(), SEED, levels=100)
    policy = toy()
    updater = Updater(policy, made, made.config)
    for _ in range(200):
        updater.train(batch, np.zeros(2, np.float32))
    (pairs,) = made.draw(batch)
    clean, noise, _ = seen(batch, pairs)
    weights = np.exp([0.0, 4.0])[pairs.rows][:, None, None, None]
    optimum = (weights * (noise - clean)).sum(axis=0) / weights.sum(axis=0)
    np.testing.assert_allclose(policy.theta.detach().numpy(), optimum, atol=1e-3)
    to_good, to_bad = (np.abs(-policy.theta.detach().numpy() - batch.latents[row, -1]).max() for row in (1, 0))
    assert to_good < 0.2 * to_bad  # what the noise, of mean 0, leaves


class Seen(NegativeAware):
    """Notes the weights with which it is asked for what was before."""

    def before(self, policy: Any, batch: Batch, pairs: Pairs) -> torch.Tensor:
        self.weights = policy.theta.detach().clone()
        return super().before(policy, batch, pairs)


def test_old_is_the_policy_that_samples_and_the_trained_one_goes_on_from_its_own_weights() -> None:
    policy, batch, other = toy(), batch_of(8), torch.full_like(THETA, 7.0)
    made = Seen(config(lr=1e-6), SEED)
    Updater(policy, made, made.config).train(batch, normal(8), {"theta": other})
    assert torch.equal(made.weights, other)
    torch.testing.assert_close(policy.theta.detach(), THETA, rtol=0, atol=1e-4)


def test_samplers_follow_ever_more_slowly_up_to_a_bound() -> None:
    made = NegativeAware(config(), SEED, follow=0.5, follow_rise=0.125)
    assert [made.following(number) for number in (0, 1, 4, 100)] == [0, 0.125, 0.5, 0.5]
    assert [kind(config(), SEED).following(100) for kind in ALL if kind is not NegativeAware] == [0, 0, 0]


# ---- by name


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("rwr", {"levels": 0}, "levels=0 must be at least 1"),
        ("awm", {"passes": 1.5}, "passes=1.5 must be a whole number"),
        ("rwr_sparse", {"share": 0}, "share=0 must be above 0 and at most 1"),
        ("rwr", {"temperature": -1}, "temperature=-1 must be above 0"),
        ("rwr", {"within_prompt": "no"}, "within_prompt=no must be true or false"),
        ("nft", {"beta": 0}, "beta=0 must be above 0"),
        ("nft", {"beta": float("nan")}, "beta=nan must be a finite number"),
        ("nft", {"beta": True}, "beta=True must be a finite number"),
        ("nft", {"follow": 1}, r"follow=1 must lie in \[0, 1\)"),
        ("nft", {"temperature": 1}, "do not fit nft"),
    ],
)
def test_arguments_that_cannot_be_are_refused(name: str, args: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_objective(dataclasses.replace(Config(), learner=config(objective=name, objective_args=args)))


@pytest.mark.parametrize("name", ["rwr", "rwr_sparse"])
def test_who_weighs_the_pictures_by_itself_refuses_a_share_of_best_and_worst(name: str) -> None:
    with pytest.raises(UserError, match=f"and {name} weighs them by itself: set learner.train_share=1"):
        make_objective(dataclasses.replace(Config(), learner=config(objective=name, train_share=0.5)))


# ---- the KL to the base model


class Scaling(GaussianToy):
    """mean = (1 + theta) x: another mean at every state."""

    def gaussian(
        self, latents: torch.Tensor, step_index: torch.Tensor, conditioning: tuple[torch.Tensor, ...], _: str = "full"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = super().gaussian(latents, step_index, conditioning)
        return latents + mean * latents, std


@pytest.mark.parametrize("microbatch", [3, 1000])
def test_kl_to_base_is_that_of_paths_through_the_noised_pictures(microbatch: int) -> None:
    policy = Scaling(THETA, [0.5, 0.1])
    policy.schedule = dataclasses.replace(policy.schedule, timesteps=torch.tensor([880, 210]))  # levels 2 and 0 of 3
    batch = dataclasses.replace(toy_batch(policy, 6), log_probs=np.empty((6, 0), np.float32))
    made = NegativeAware(config(), SEED)
    measured = Updater(policy, made, config(microbatch=microbatch)).kl_to_base(batch)
    expected = []
    for row in range(6):
        for step, (sigma, std) in enumerate([(0.9, 0.5), (0.2, 0.1)]):
            noise = np.random.default_rng([SEED, STREAM, 0, NOISE, row, step]).standard_normal(SHAPE)
            x = (1 - sigma) * batch.latents[row, -1] + sigma * noise
            expected.append(np.mean((THETA.numpy() * x) ** 2) / (2 * std**2))
    assert measured is not None
    assert measured.dimension == pytest.approx(np.mean(expected), rel=1e-6)
    assert measured.trajectory == pytest.approx(np.mean(expected) * D * 2, rel=1e-6)


def test_the_nearest_level_is_the_timestep_itself_where_there_is_one() -> None:
    levels = ddpm_noise_levels(scheduler())
    assert levels.nearest(torch.tensor([981, 1, 500])).tolist() == [981, 1, 500]
    assert toy().noise_levels.nearest(torch.tensor([340.0, 360.0, 2000.0])).tolist() == [0, 1, 2]
