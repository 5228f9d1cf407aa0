"""A whole run in one process, without Ray: the real workers and the real buffer, one step after another.

    python -m workers.local compressibility run.name=mine [key=value ...]

What `launch.py` does with actors stands here on one screen. Read it first, step through it in a debugger, call `run`
from a notebook or a test. At buffer.max_staleness=0 it leaves the same weights, rows and scores, bit for bit.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from buffer.buffer import TrajectoryBuffer
from buffer.orders import Plan
from buffer.run_folder import RunFolder
from buffer.settings import combination_of, plan_of, rules_of
from common.clock import Clock
from common.commands import AGAIN, command
from common.errors import UserError
from common.files import disk_stops_the_run
from common.precision import exact_float32
from conf.load import help_text, load
from conf.prompts import prompts_of_run
from conf.resume import RunLock, check_resume, save_config
from conf.schema import Config
from conf.validate import validate
from evaluation.history import is_over, why_stopped
from evaluation.summary import outcome
from learner.learner import Learner
from learner.registry import make_objective
from policy.policy import Policy
from report.record import RECORD_S, by_place, record_end, record_sitting
from report.report import write_report
from rewards.base import NamedReward, try_out
from rewards.registry import resolve
from workers.checks import check_run
from workers.publisher import Publisher
from workers.replay import Replay
from workers.sampler import Sampler, policies_of
from workers.scorer import NothingScored, Scorer
from workers.trainer import Trainer


def run(config: Config, prompts: Sequence[str]) -> Path:
    """Begins the run or goes on with it, until it is finished or its guard stops it. Gives its folder.

    Raises UserError for what is wrong with the settings, RunStopped when the run cannot go on, and whatever else a
    worker raises: here nobody takes its place.
    """
    validate(config)
    if config.run.mirror is not None:
        raise UserError(f"run.mirror={config.run.mirror}: only launch.py keeps a mirror, so set run.mirror=null")
    exact_float32()
    run_dir = Path(config.run.dir).absolute() / config.run.name  # whatever folder a user's class goes to
    with RunLock(run_dir), ExitStack() as closing:  # whatever ends the run, in a notebook, too
        closing.enter_context(disk_stops_the_run(run_dir))
        check_resume(run_dir, config, list(prompts))
        replay = Replay(config, make_objective(config).needs) if config.run.replay else None
        plan = replay.plan(config, prompts) if replay else plan_of(config, prompts)
        run = RunFolder(run_dir)
        if not (is_over(run, config) and run.plan == plan.identity()):  # of others, the buffer says what differs
            for remark in check_run(config, prompts).remarks:
                print(remark, file=sys.stderr)
            _train(config, prompts, plan, replay, run_dir, closing)
    return run_dir


def _train(
    config: Config, prompts: Sequence[str], plan: Plan, replay: Replay | None, run_dir: Path, closing: ExitStack
) -> None:
    started = time.time()
    stored, scores = (replay.rollout, replay.scores) if replay else (None, None)
    device = "cuda" if torch.cuda.is_available() and config.learner.num_gpus else "cpu"
    learner = Learner.load(config, device)
    policy = Policy.load(config.model, config.sampling, config.run.seed, device, trainable=False)
    rewards = _tried_rewards(config, prompts, policy.image_size)
    save_config(run_dir, config, list(prompts))
    buffer = TrajectoryBuffer(run_dir, plan, rules_of(config), combination_of(config))
    closing.callback(buffer.close)
    publisher = Publisher(config, run_dir, buffer, lambda weights: weights, max(buffer.state.next_batch, 0))
    closing.callback(publisher.close)
    clocks = {"learner-0.0": Clock(), "sampler-0.0": Clock()} | {f"reward-{r.name}-0.0": Clock() for r in rewards}
    trainer = Trainer("learner-0.0", learner, buffer, run_dir, clocks["learner-0.0"])
    policies, needs, clock = policies_of(policy, config), learner.objective.needs, clocks["sampler-0.0"]
    sampler = Sampler("sampler-0.0", policies, needs, buffer, lambda weights: weights, clock, stored)
    workers: list[tuple[Sampler | Scorer | Trainer, int]] = [(sampler, config.samplers.threads)]
    for reward in rewards:
        name, own = f"reward-{reward.name}-0.0", config.rewards[reward.name]
        workers.append((Scorer(name, reward, own.batch_size, buffer, clocks[name], scores), own.threads))
    workers.append((trainer, config.learner.threads))

    def record() -> float:
        spent = by_place({name: clock.read() for name, clock in clocks.items()})
        record_sitting(run_dir, buffer.epoch, started, spent)
        return time.monotonic()

    closing.callback(record)
    torch.set_num_threads(config.learner.threads)  # here and below: last bits depend on it
    trainer.begin()
    torch.set_num_threads(config.samplers.threads)
    sampler.begin()
    recorded = record()
    while True:
        if replay:
            replay.check(publisher.log.rows)
        publisher.step(buffer.news())
        if buffer.finished or publisher.stops:
            break
        buffer.slow(publisher.lr_halvings)
        found_work = []
        for worker, threads in workers:
            torch.set_num_threads(threads)
            try:
                found_work.append(worker.step())
            except NothingScored:  # a new process would try next, and here is only this one
                found_work.append(True)
        assert any(found_work), f"nobody has anything to do: {buffer.news()}"
        recorded = record() if time.monotonic() - recorded > RECORD_S else recorded
    publisher.save_lora()
    record()
    write_report(run_dir)
    if buffer.finished:
        record_end(run_dir, config.run.batches)


def _tried_rewards(config: Config, prompts: Sequence[str], image_size: tuple[int, int]) -> list[NamedReward]:
    rewards = [resolve(name, reward.path, reward.args) for name, reward in config.rewards.items()]
    for reward in rewards:
        try_out(reward, prompts, image_size)
    return rewards


def ending(run_dir: Path, config: Config) -> str:
    """How a run ended, what it did for its reward, and how to train on, in words."""
    run = RunFolder(run_dir)
    how = "stopped" if why_stopped(run, config) else "finished"
    return f"{outcome(run_dir, how)}\n{is_over(run, config) or f'report: {run_dir}/report.html'}"


@command("workers.local", interrupted=AGAIN)
def main(arguments: Sequence[str]) -> None:
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{help_text()}")
        return
    config = load([*arguments])
    print(ending(run(config, prompts_of_run(config)), config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
