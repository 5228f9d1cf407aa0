"""The update against closed forms on a Gaussian, and what it does when numbers or memory run out."""

import dataclasses
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import RunStopped
from conf.schema import LearnerConfig
from learner.advantages import PerPrompt
from learner.batch import Batch
from learner.kl_target import steered
from learner.metrics import finite, reward_metrics, update_metrics
from learner.objectives.ddpo import Decoupled, ImportanceSampling, PolicyGradient, ScoreFunction
from learner.objectives.objective import Objective, Pairs
from learner.ranks import Ranks
from learner.update import KL_PAIRS, Updater
from policy import gaussian
from tests.learner.learner_toy import SHAPE, D, GaussianToy, toy_batch

STDS = [0.9, 0.5, 0.2]
THETA = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64).reshape(SHAPE)


def config(**changes: Any) -> LearnerConfig:
    return dataclasses.replace(LearnerConfig(lr=0.02, max_grad_norm=1e9, weight_decay=0.0), **changes)


def updater_of(
    policy: GaussianToy, config: LearnerConfig, kind: type[Objective] = ImportanceSampling, ranks: Ranks | None = None
) -> Updater:
    return Updater(policy, kind(config, seed=0), config, ranks)


def drawn(batch: Batch, seed: int = 0, **changes: Any) -> list[Pairs]:
    """The pairs of each optimizer step."""
    return ImportanceSampling(config(**changes), seed).draw(batch)


def all_pairs(batch: Batch) -> Pairs:
    return drawn(batch, optimizer_steps=1)[0]


def gradient_of(policy: GaussianToy) -> torch.Tensor:
    assert policy.theta.grad is not None
    return policy.theta.grad


def normal(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=count).astype(np.float32)


def score_function_gradient(batch: Batch, advantages: np.ndarray, theta: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """-mean over pairs of factor A (x_next - theta) / (D std^2): by hand, one pair after another."""
    total = np.zeros(SHAPE)
    for row in range(len(batch)):
        for step, std in enumerate(STDS):
            action = batch.latents[row, step + 1]
            total -= factor[row, step] * float(advantages[row]) * (action - theta) / (D * std**2)
    return total / (len(batch) * len(STDS))


@pytest.mark.parametrize("kind", [ImportanceSampling, ScoreFunction, Decoupled])
@pytest.mark.parametrize("microbatch", [1, 7, 1000])
def test_gradient_at_ratio_one_is_the_closed_form(kind: type[PolicyGradient], microbatch: int) -> None:
    policy = GaussianToy(THETA, STDS)
    batch, advantages = toy_batch(policy, 20), normal(20)
    updater = updater_of(policy, config(), kind)
    outputs = updater.gradient(batch, advantages, all_pairs(batch), microbatch)
    expected = score_function_gradient(batch, advantages, THETA.numpy(), np.ones((20, 3)))
    np.testing.assert_allclose(gradient_of(policy).numpy(), expected, rtol=1e-12)
    assert (outputs["ratio"] == 1).all() and not outputs["clipped"].any()


@pytest.mark.parametrize(("step_weight", "power"), [("equal", (0, 0)), ("std", (1, 0)), ("output", (1, -1))])
@pytest.mark.parametrize("train_steps", [None, 2])
def test_a_steps_weight_multiplies_its_pairs_and_the_weights_of_the_trained_steps_have_mean_one(
    step_weight: str, power: tuple[int, int], train_steps: int | None
) -> None:
    policy = GaussianToy(THETA, STDS)
    scales = np.array([-2.0, 1.0, 0.5])  # DDIM's are negative
    policy.schedule = dataclasses.replace(policy.schedule, output_scale=torch.from_numpy(scales))
    batch, advantages, settings = toy_batch(policy, 20), normal(20), config(train_steps=train_steps)
    updater = Updater(policy, ImportanceSampling(settings, 0, step_weight), settings)
    updater.gradient(batch, advantages, drawn(batch, optimizer_steps=1, train_steps=train_steps)[0], 7)
    trained = len(STDS) if train_steps is None else train_steps
    weights = (np.array(STDS) ** power[0] * np.abs(scales) ** power[1])[:trained]
    factor = np.zeros((20, len(STDS)))
    factor[:, :trained] = weights / weights.mean() * len(STDS) / trained  # the mean is over the trained pairs
    expected = score_function_gradient(batch, advantages, THETA.numpy(), factor)
    np.testing.assert_allclose(gradient_of(policy).numpy(), expected, rtol=1e-12)


def test_gradient_off_policy_is_the_closed_form_with_the_clipped_pairs_left_out() -> None:
    batch, advantages, clip = toy_batch(GaussianToy(THETA, STDS), 40), normal(40), 0.02
    moved = GaussianToy(THETA + 0.01, STDS)
    updater_of(moved, config(clip_range=clip)).gradient(batch, advantages, all_pairs(batch), 16)
    new = toy_log_probs(moved, batch)
    ratio = np.exp(new - batch.log_probs)
    up, down = (advantages[:, None] > 0) & (ratio > 1 + clip), (advantages[:, None] < 0) & (ratio < 1 - clip)
    assert up.any() and down.any() and not (up | down).all()
    expected = score_function_gradient(batch, advantages, THETA.numpy() + 0.01, np.where(up | down, 0, ratio))
    np.testing.assert_allclose(gradient_of(moved).numpy(), expected, rtol=1e-10)


@torch.no_grad()
def toy_log_probs(policy: GaussianToy, batch: Batch) -> np.ndarray:
    columns = [
        policy.log_prob(
            torch.from_numpy(batch.latents[:, step]),
            torch.from_numpy(batch.latents[:, step + 1]),
            torch.full((len(batch),), step),
            (torch.zeros(1),),
        )
        for step in range(batch.num_steps)
    ]
    return torch.stack(columns, dim=1).numpy()


@pytest.mark.parametrize(("kind", "steps"), [(ImportanceSampling, 2), (ScoreFunction, 1)])
def test_ddpo_improves_the_expected_reward(kind: type[PolicyGradient], steps: int) -> None:
    """E r = -(|theta - target|^2 / D + std^2): the distance has to shrink to a fraction."""
    target = torch.full(SHAPE, 1.0)
    policy = GaussianToy(torch.zeros(SHAPE), STDS)
    settings = config(clip_range=0.05, lr=0.03, optimizer_steps=steps)
    updater, advantage = updater_of(policy, settings, kind), PerPrompt(settings)
    before = ((policy.theta - target) ** 2).mean().item()
    for number in range(80):
        batch = toy_batch(policy, 32, number, target)
        updater.train(batch, advantage(batch.prompts, batch.rewards, batch.groups))
    assert ((policy.theta - target) ** 2).mean().item() < 0.1 * before


def test_shares_hold_every_pair_once_and_shuffle_each_trajectory_by_itself() -> None:
    batch = toy_batch(GaussianToy(THETA, [0.5] * 6), 10)
    steps = drawn(batch, seed=4, optimizer_steps=3)
    pairs = [pair for share in steps for pair in zip(share.rows, share.steps, strict=True)]
    assert sorted(pairs) == [(row, step) for row in range(10) for step in range(6)]
    assert sorted(len(set(share.rows)) for share in steps) == [3, 3, 4]
    assert len({tuple(share.steps[share.rows == row]) for share in steps for row in set(share.rows)}) > 5
    for share in steps:  # every timestep of a trajectory belongs to one optimizer step
        assert all((share.rows == row).sum() == 6 for row in set(share.rows))
    again, other = (drawn(batch, seed=seed, optimizer_steps=3) for seed in (4, 5))
    assert all((a.rows == b.rows).all() and (a.steps == b.steps).all() for a, b in zip(steps, again, strict=True))
    assert any((a.rows[:3] != b.rows[:3]).any() for a, b in zip(steps, other, strict=True))


def test_a_batch_of_fewer_trajectories_than_optimizer_steps_takes_one_step_a_trajectory() -> None:
    policy = GaussianToy(THETA, STDS)
    results = updater_of(policy, config(optimizer_steps=4)).train(toy_batch(policy, 3), normal(3))
    assert [len(result.pairs) for result in results] == [3, 3, 3]


def test_gradient_norm_is_clipped_and_reported_as_it_was() -> None:
    policy = GaussianToy(THETA, STDS)
    batch, advantages = toy_batch(policy, 8), 100 * normal(8)
    updater = updater_of(policy, config())
    updater.gradient(batch, advantages, all_pairs(batch), 64)
    norm = gradient_of(policy).norm().item()
    clipped = updater_of(policy, config(max_grad_norm=0.5, optimizer_steps=1))
    assert norm > 0.5
    assert clipped.train(batch, advantages)[0].grad_norm == pytest.approx(norm, rel=1e-12)
    # AdamW's first moment is 0.1 times the gradient that it was given
    moment = clipped.optimizer.state[policy.theta]["exp_avg"]
    assert moment.norm().item() == pytest.approx(0.05, rel=1e-5)


def test_kl_to_base_is_the_closed_form_and_says_its_scale() -> None:
    """|theta|^2 / (2 std^2) a step; on as many pairs as there are, so nothing is estimated."""
    policy = GaussianToy(THETA, STDS)
    batch = toy_batch(policy, KL_PAIRS // len(STDS))
    assert len(all_pairs(batch)) <= KL_PAIRS
    measured = updater_of(policy, config(microbatch=5)).kl_to_base(batch)
    assert measured is not None
    per_step = [(THETA**2).sum().item() / (2 * std**2) for std in STDS]
    assert measured.trajectory == pytest.approx(sum(per_step), rel=1e-12)
    assert measured.dimension == pytest.approx(sum(per_step) / len(STDS) / D, rel=1e-12)


@pytest.mark.parametrize("kind", [ImportanceSampling, ScoreFunction, Decoupled])
@pytest.mark.parametrize("microbatch", [1, 7, 1000])
def test_the_kl_penalty_pulls_to_the_base_as_the_closed_form_says(kind: type[PolicyGradient], microbatch: int) -> None:
    """Beside the loss of before; its own gradient is weight * theta / std^2 / D, in the mean over steps."""
    policy, weight = GaussianToy(THETA, STDS), 0.7
    batch, advantages = toy_batch(policy, 20), normal(20)
    updater = updater_of(policy, config(kl_weight=weight), kind)
    outputs = updater.gradient(batch, advantages, all_pairs(batch), microbatch)
    pull = weight * THETA.numpy() * np.mean([1 / std**2 for std in STDS]) / D
    reward = score_function_gradient(batch, advantages, THETA.numpy(), np.ones((20, 3)))
    np.testing.assert_allclose(gradient_of(policy).numpy(), reward + pull, rtol=1e-12)
    without = updater_of(policy, config(), kind).gradient(batch, advantages, all_pairs(batch), microbatch)
    base = updater.kl_to_base(batch)
    assert base is not None
    added = (outputs["loss"] - without["loss"]).mean().item()
    assert added == pytest.approx(weight * base.dimension, rel=0.2)  # that is estimated on some of the pairs


@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("lr", [0.003, 0.01])
def test_the_steered_weight_brings_the_kl_to_its_target_from_wherever_it_starts(start: float, lr: float) -> None:
    """The reward pulls away from the base for ever; with the weight that is found, the KL stays where it is wanted."""
    policy, target, settings = GaussianToy(0.01 * THETA, STDS), 0.02, config(kl_weight=start, lr=lr)
    updater, advantage, found = updater_of(policy, settings), PerPrompt(settings), [0.0]
    for number in range(200):
        batch = toy_batch(policy, 64, number, target=torch.full(SHAPE, 3.0))
        base = updater.kl_to_base(batch)
        assert base is not None
        updater.train(batch, advantage(batch.prompts, batch.rewards, batch.groups))
        found.append(base.dimension)
        updater.objective.kl_weight = steered(updater.objective.kl_weight, found[-1], found[-2], target)
    assert found[1] < 0.01 * target
    assert np.mean(found[-50:]) == pytest.approx(target, rel=0.1)
    assert np.std(found[-50:]) < 0.25 * target


def test_a_step_that_is_not_finite_is_not_taken_and_three_in_a_row_stop_the_run() -> None:
    policy = GaussianToy(THETA, STDS)
    updater = updater_of(policy, config(optimizer_steps=1))
    batch, bad = toy_batch(policy, 8), normal(8)
    bad[3] = np.nan
    for _ in range(2):
        result = updater.train(batch, bad)[0]
        assert not result.taken
        measured = finite(updater.objective.metrics(batch, [result]))
        metrics = measured | update_metrics([result], updater.kl_to_base(batch))
        assert metrics["non_finite_steps"] == 1 and not {"loss", "clip_fraction", "kl/step"} & metrics.keys()
    assert torch.equal(policy.theta, THETA) and policy.theta not in updater.optimizer.state
    assert updater.train(batch, normal(8))[0].taken  # a good one between: counted from the start again
    assert not torch.equal(policy.theta, THETA)
    after = policy.theta.detach().clone()
    updater.train(batch, bad)
    updater.train(batch, bad)
    with pytest.raises(RunStopped, match="not finite"):
        updater.train(batch, bad)
    assert torch.equal(policy.theta, after)


def test_a_gradient_that_is_not_finite_is_not_taken_though_the_loss_is() -> None:
    policy = GaussianToy(THETA, STDS)
    policy.theta.register_hook(lambda gradient: gradient * torch.inf)
    result = updater_of(policy, config(optimizer_steps=1)).train(toy_batch(policy, 8), normal(8))[0]
    assert np.isfinite(result.loss) and not result.taken and torch.equal(policy.theta, THETA)


def test_out_of_memory_halves_the_microbatch_and_gives_the_same_gradient(caplog: pytest.LogCaptureFixture) -> None:
    enough, little = GaussianToy(THETA, STDS), GaussianToy(THETA, STDS, memory=5)
    batch, advantages = toy_batch(enough, 20), normal(20)
    results = []
    for policy in (enough, little):
        updater = updater_of(policy, config(microbatch=32, max_grad_norm=1e9, optimizer_steps=1))
        results.append(updater.train(batch, advantages)[0])
    assert updater.microbatch == 4 and updater.halvings == 3
    assert "learner.microbatch=4" in caplog.text
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-12)
    torch.testing.assert_close(little.theta, enough.theta, rtol=1e-12, atol=0)


def test_memory_that_runs_out_midway_does_not_leave_half_a_gradient() -> None:
    policy = GaussianToy(THETA, STDS)
    batch, advantages = toy_batch(policy, 20), normal(20)
    updater = updater_of(policy, config(microbatch=16))
    updater.gradient(batch, advantages, all_pairs(batch), 16)
    expected = gradient_of(policy).clone()
    policy.calls.clear()
    gaussian = policy.gaussian

    def tight(latents: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(policy.calls) == 1 and len(latents) == 16:
            raise torch.OutOfMemoryError("out of memory")
        return gaussian(latents, *rest)

    policy.gaussian = tight  # type: ignore[method-assign, assignment]
    updater.within_memory(lambda microbatch: updater.gradient(batch, advantages, all_pairs(batch), microbatch))
    assert updater.microbatch == 8
    torch.testing.assert_close(gradient_of(policy), expected, rtol=1e-12, atol=0)


def test_one_pair_that_does_not_fit_stops_the_run_with_a_sentence() -> None:
    policy = GaussianToy(THETA, STDS)
    batch = toy_batch(policy, 8)
    policy.memory = 0
    with pytest.raises(RunStopped, match="gradient_checkpointing"):
        updater_of(policy, config()).train(batch, normal(8))


def test_the_advice_on_memory_names_what_helps_and_not_what_is_set_already() -> None:
    """Checkpointing may change when the run goes on; the dtype may not."""
    batch = toy_batch(GaussianToy(THETA, STDS), 8)
    said = {}
    for checkpointing in (False, True):
        policy = GaussianToy(THETA, STDS, memory=0)
        with pytest.raises(RunStopped) as stopped:
            updater_of(policy, config(gradient_checkpointing=checkpointing)).train(batch, normal(8))
        said[checkpointing] = str(stopped.value)
    assert "set learner.gradient_checkpointing=true" in said[False] and "same command" in said[False]
    assert "set learner.gradient_checkpointing" not in said[True] and "a larger GPU" in said[True]
    for sentence in said.values():
        assert "under another run.name" in sentence and len(sentence) <= 500


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    MemoryError("Unable to allocate 2.00 GiB for an array with shape (16384, 32768) and data type float32"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried to 8"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
]
OTHER_ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1"),
    ValueError("out of memory is not what this is"),
]


def failing(memory: int, error: Exception) -> GaussianToy:
    """Raises `error` for more pairs than `memory`."""
    policy = GaussianToy(THETA, STDS)
    gaussian = policy.gaussian

    def raising(latents: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(latents) > memory:
            raise error
        return gaussian(latents, *rest)

    policy.gaussian = raising  # type: ignore[method-assign, assignment]
    return policy


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:40])
def test_memory_of_any_kind_that_runs_out_halves_the_microbatch(error: Exception) -> None:
    batch = toy_batch(GaussianToy(THETA, STDS), 20)
    updater = updater_of(failing(5, error), config(microbatch=16, optimizer_steps=1))
    assert updater.train(batch, normal(20))[0].taken
    assert updater.microbatch == 4 and updater.halvings == 2


@pytest.mark.parametrize("error", OTHER_ERRORS, ids=lambda error: str(error)[:40])
def test_a_poisoned_device_is_not_answered_by_a_smaller_microbatch(error: Exception) -> None:
    batch = toy_batch(GaussianToy(THETA, STDS), 20)
    updater = updater_of(failing(5, error), config(microbatch=16))
    with pytest.raises(type(error)) as raised:
        updater.train(batch, normal(20))
    assert raised.value is error and updater.microbatch == 16 and updater.halvings == 0


def test_real_memory_of_the_host_that_runs_out_is_recognised() -> None:
    """What torch and numpy themselves raise here, not sentences that were written down once."""
    for ask in (lambda: torch.empty(2**60, dtype=torch.float32), lambda: np.ones(2**58, np.float32)):
        policy = GaussianToy(THETA, STDS)
        updater = updater_of(policy, config(microbatch=2))

        def work(microbatch: int, ask: Any = ask) -> int:
            if microbatch > 1:
                ask()
            return microbatch

        assert updater.within_memory(work) == 1


# ---- graphs


class Node:
    """Stands for a node of the graph, to which itself there are no weak references."""


@pytest.mark.parametrize("kind", [ImportanceSampling, Decoupled])
def test_no_graph_outlives_its_microbatch(kind: type[PolicyGradient], monkeypatch: pytest.MonkeyPatch) -> None:
    """A node of the graph holds what its forward pass saved, and some of that even after backward."""
    policy = GaussianToy(THETA, STDS)
    batch = toy_batch(policy, 20)
    nodes: list[weakref.ref[Node]] = []
    alive: list[int] = []
    log_prob = gaussian.log_prob

    def watched(*arguments: Any) -> torch.Tensor:
        alive.append(sum(node() is not None for node in nodes))
        values = log_prob(*arguments)
        if values.grad_fn is not None:
            node = Node()
            graph: Any = values.grad_fn
            graph.metadata["lives as long as the graph's node"] = node
            nodes.append(weakref.ref(node))
        return values

    monkeypatch.setattr(gaussian, "log_prob", watched)
    updater = updater_of(policy, config(microbatch=4, optimizer_steps=2), kind)
    updater.train(batch, normal(20))
    assert len(nodes) == 16 and max(alive) == 0
    assert not any(node() is not None for node in nodes)


def test_what_an_optimizer_step_gives_back_holds_no_graph() -> None:
    policy = GaussianToy(THETA, STDS)
    batch = toy_batch(policy, 8)
    outputs = updater_of(policy, config()).gradient(batch, normal(8), all_pairs(batch), 4)
    assert set(outputs) == {"loss", *ImportanceSampling.measures}
    assert all(value.grad_fn is None and not value.requires_grad for value in outputs.values())


# ---- a rank that has no pairs


@pytest.mark.parametrize("kind", [ImportanceSampling, Decoupled])
def test_a_rank_without_pairs_has_a_gradient_of_zero_and_measures_nothing(kind: type[PolicyGradient]) -> None:
    policy = GaussianToy(THETA, STDS)
    settings, batch = config(train_steps=1), toy_batch(policy, 1)
    (pairs,) = drawn(batch, train_steps=1, optimizer_steps=1)  # one pair, and three ranks
    assert len(pairs) == 1
    ranks = [Ranks(rank, 3) for rank in range(3)]
    updaters = [updater_of(policy, settings, kind, each) for each in ranks]
    parts, gradients = [], []
    for updater in updaters:
        parts.append(updater.gradient(batch, normal(1), pairs, 4))
        gradients.append(gradient_of(policy).clone())
    assert sorted(len(part["loss"]) for part in parts) == [0, 0, 1]
    assert len({(value.dtype, value.ndim) for part in parts for value in part.values()}) == 1
    assert [bool(gradient.any()) for gradient in gradients] == [len(part["loss"]) == 1 for part in parts]
    for each, updater in zip(ranks, updaters, strict=True):
        policy.calls.clear()
        before = updater._with_before(batch, pairs).before
        mine = kind is Decoupled and len(range(*each.part(1).indices(1))) == 1
        assert policy.calls == [1] * mine
        assert np.isfinite(before).all() if before is not None else not mine


def test_metrics_of_a_batch_by_hand() -> None:
    policy = GaussianToy(THETA, STDS)
    batch = toy_batch(policy, 12)
    parts = {"caption": np.arange(12, dtype=np.float32), "caption.empty": np.array([0, 1, np.nan] * 4, np.float32)}
    batch = dataclasses.replace(batch, ages=np.array([0, 1] * 6, np.int32), parts=parts)
    batch.log_probs[:6] += 0.25  # the gap that a rollout of another precision would show
    updater = updater_of(policy, config(optimizer_steps=1, clip_range=0.1))
    base = updater.kl_to_base(batch)
    assert base is not None
    steps = updater.train(batch, normal(12))
    metrics = updater.objective.metrics(batch, steps) | update_metrics(steps, base)
    assert metrics["ratio/gap"] == pytest.approx(0.25, rel=1e-6)
    assert metrics["ratio/max_abs_log_true"] == pytest.approx(0.25 * D, rel=1e-6)
    assert metrics["ratio/mean"] == pytest.approx((1 + np.exp(-0.25)) / 2, rel=1e-6)
    assert metrics["clip_fraction"] == 0.5
    assert metrics["kl/step"] == pytest.approx(0.25**2 / 4, rel=1e-6)
    assert metrics["kl/step_true"] == pytest.approx((0.25 * D) ** 2 / 4, rel=1e-6)
    assert metrics["kl/base"] == base.trajectory and metrics["grad_norm"] == steps[0].grad_norm
    about = reward_metrics(batch, 16, {"prompt 0": 1.0, "prompt 1": 2.0, "prompt 9": 50.0})
    assert about["set_aside"] == 4 and about["trajectories"] == 12
    assert about["age/mean"] == 0.5 and about["age/max"] == 1
    assert about["reward/std_per_prompt"] == 1.5
    assert about["reward/caption"] == 5.5 and about["reward/caption.empty"] == 0.5
    assert about["reward/mean"] == pytest.approx(np.mean(batch.rewards.astype(float)), rel=1e-12)


def test_no_gap_is_given_where_no_row_is_fresh() -> None:
    policy = GaussianToy(THETA, STDS)
    batch = dataclasses.replace(toy_batch(policy, 6), ages=np.ones(6, np.int32))
    updater = updater_of(policy, config())
    metrics = finite(updater.objective.metrics(batch, updater.train(batch, normal(6))))
    assert "ratio/gap" not in metrics and metrics["ratio/max_abs_log"] == 0
