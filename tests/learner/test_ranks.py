"""Several learner ranks over gloo, in processes of their own, against one."""

import multiprocessing
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.schema import Config, DType
from learner.batch import Batch
from learner.learner import Learner
from learner.ranks import Meeting, Ranks, RanksDisagree
from tests.learner.test_pipeline import away_from_zero, error, load, make_batch, one_step, small
from tests.pipelines import tiny_pipeline

pytestmark = pytest.mark.long

PATIENCE_S = 1800  # a rank that dies closes its pipe, and is noticed at once
Work = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("model") / "tiny")


def together(count: int, work: Work, *args: Any) -> list[Any]:
    """What `work(ranks, *args)` gives on each of `count` ranks."""
    with meeting(count, work, *args) as pipes:
        answers = []
        for pipe in pipes:
            assert pipe.poll(PATIENCE_S), "a rank does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        return answers


@contextmanager
def meeting(count: int, work: Work, *args: Any) -> Iterator[list[Connection]]:
    """The ranks' pipes; rank 0 tells the others where it listens."""
    context = multiprocessing.get_context("forkserver")  # which imports torch once, for all of them
    context.set_forkserver_preload([__name__])
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=be_a_rank, args=(rank, count, theirs, work, *args)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        assert pipes[0].poll(PATIENCE_S)
        at = pipes[0].recv()
        for pipe in pipes[1:]:
            pipe.send(at)
        yield pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def be_a_rank(rank: int, count: int, pipe: Connection, work: Work, *args: Any) -> None:
    if rank == 0:
        meeting_point = Meeting("127.0.0.1")
        pipe.send((meeting_point.address, meeting_point.port))
    else:
        meeting_point = Meeting("127.0.0.1", pipe.recv())
    answer = work(Ranks.join(rank, count, meeting_point, "cpu"), *args)
    pipe.send_bytes(pickle.dumps(answer))  # `send` would share tensors' memory, which ends with this process


def gradient(ranks: Ranks, config: Config, batch: Batch) -> tuple[Tensor, Tensor]:
    """float [parameters] of one optimizer step: this rank's part, and the sum over ranks."""
    policy = load(config)
    away_from_zero(policy)
    updater = one_step(policy, config, ranks)
    advantages = np.random.default_rng(2).normal(size=len(batch)).astype(np.float32)
    updater.gradient(batch, advantages, updater.objective.draw(batch)[0], 7)
    gradients = [p.grad for p in updater.parameters.values() if p.grad is not None]
    part = torch.cat([gradient.flatten() for gradient in gradients])
    ranks.sum(gradients)
    return part, torch.cat([gradient.flatten() for gradient in gradients])


def test_the_gradient_of_an_optimizer_step_is_that_of_one_learner(folder: Path) -> None:
    config = small(folder)
    config.learner.clip_range = 1.0  # the last bits must not decide what is clipped
    policy = load(config)
    away_from_zero(policy)
    batch = make_batch(policy, 0)
    _, alone = gradient(Ranks(), config, batch)
    (part, whole), (other_part, other_whole) = together(2, gradient, config, batch)
    print(f"\nrelative error of the gradient: {error(whole, alone):.1e}")
    assert alone.norm() > 0
    assert error(whole, alone) < 1e-5
    assert torch.equal(whole, other_whole)  # bit for bit, so that weights never drift apart
    assert error(part, alone) > 0.1 and error(part + other_part, alone) < 1e-5


Weights = tuple[dict[str, Tensor], dict[str, float]]


def weights_after(ranks: Ranks, configs: list[Config], batches: list[Batch]) -> list[Weights]:
    """LoRA weights and the last batch's metrics, for each configuration."""
    results = []
    for config in configs:
        policy = load(config)
        away_from_zero(policy)
        learner = Learner(policy, config, ranks)
        for batch in batches:
            learner.train(batch)
            ranks.agree("weights", learner.version.digest)
        results.append((policy.lora_state(), learner.metrics))
    return results


def test_weights_after_three_batches_are_those_of_one_learner(folder: Path) -> None:
    configs = [small(folder) for _ in range(3)]
    for config, objective in zip(configs, ("ddpo_is", "ddpo_decoupled", "nft"), strict=True):
        config.model.dtype = DType.float64
        config.learner.objective = objective
        config.sampling.steps = 4
    policy = load(configs[0])
    away_from_zero(policy)
    start = policy.lora_state()
    batches = [make_batch(policy, number) for number in range(3)]  # the second and third are off-policy
    singles = weights_after(Ranks(), configs, batches)
    first, second = together(2, weights_after, configs, batches)
    for (alone, metrics), (weights, group_metrics), (others, _) in zip(singles, first, second, strict=True):
        assert max((alone[name] - start[name]).abs().max() for name in alone) > 1e-3
        gap = max(float((weights[name] - alone[name]).abs().max()) for name in alone)
        print(f"\nlargest difference of weights: {gap:.1e}")
        assert gap < 1e-6
        assert all(torch.equal(weights[name], others[name]) for name in alone)
        assert group_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-9)
    assert any((singles[0][0][name] != singles[1][0][name]).any() for name in start)


@pytest.mark.parametrize("objective", ["ddpo_is", "ddpo_decoupled", "nft"])
def test_ranks_without_pairs_change_nothing(folder: Path, objective: str) -> None:
    """Pictures were set aside until an optimizer step has fewer pairs than there are ranks, and the KL, too."""
    config = small(folder)
    config.model.dtype = DType.float64
    config.learner.objective = objective
    config.learner.objective_args = {"levels": 1} if objective == "nft" else {}
    config.learner.optimizer_steps = 4
    config.learner.train_steps = 1
    config.sampling.steps = 2
    policy = load(config)
    away_from_zero(policy)
    batches = [make_batch(policy, number, count) for number, count in enumerate((2, 1, 3))]
    ((alone, metrics),) = weights_after(Ranks(), [config], batches)
    for answers in together(4, weights_after, [config], batches):
        ((weights, group_metrics),) = answers
        gap = max(float((weights[name] - alone[name]).abs().max()) for name in alone)
        assert gap < 1e-6
        assert group_metrics == pytest.approx(metrics, rel=1e-5, abs=1e-9)


def sent(ranks: Ranks, lengths: list[int]) -> tuple[list[Tensor], bool, bool, str]:
    wholes = [torch.arange(2 * length).reshape(2, length).double() for length in lengths]
    gathered = [ranks.gather(whole[:, ranks.part(whole.shape[1])]) for whole in wholes]
    any_, none = ranks.any(ranks.rank == 1), ranks.any(False)
    ranks.agree("weights", "the same")
    try:
        ranks.agree("weights", f"those of rank {ranks.rank}")
    except RanksDisagree as error:
        return gathered, any_, none, str(error)
    return gathered, any_, none, ""


def test_what_ranks_send_one_another() -> None:
    """Parts in the order of ranks are the whole, also where some ranks have nothing; different weights are noticed."""
    for gathered, any_, none, disagreement in together(3, sent, [1, 7]):
        for length, whole in zip([1, 7], gathered, strict=True):
            assert torch.equal(whole, torch.arange(2 * length).reshape(2, length).double())
        assert any_ and not none
        assert "different weights" in disagreement


def test_rank_0_listens_on_its_own_address_only() -> None:
    meeting_point = Meeting("127.0.0.1")
    assert meeting_point.socket is not None
    assert meeting_point.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError), socket.socket() as other:
        other.connect(("127.0.0.2", meeting_point.port))
    meeting_point.socket.close()
