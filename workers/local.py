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
from buffer.run_folder import RunFolder
from buffer.settings import combination_of, plan_of, rules_of
from common.clock import Clock
from common.errors import RunStopped, UserError, in_one_line
from common.files import disk_stops_the_run
from common.precision import exact_float32
from common.terminal import print_anywhere
from conf.load import help_text, load
from conf.prompts import prompts_of_run
from conf.resume import RunLock, check_resume, save_config
from conf.schema import Config
from conf.validate import validate
from evaluation.history import why_stopped
from evaluation.summary import outcome
from learner.learner import Learner
from policy.policy import Policy
from report.record import by_place, record_end, record_sitting
from report.report import write_report
from rewards.base import NamedReward, try_out
from rewards.registry import resolve
from workers.publisher import Publisher
from workers.replay import Replay
from workers.sampler import Sampler, policies_of
from workers.scorer import NothingScored, Scorer
from workers.trainer import Trainer


def run(config: Config, prompts: Sequence[str]) -> Path:
    """Begins the run or goes on with it, until it is finished. Gives its folder.

    Raises UserError for what is wrong with the settings, RunStopped when the run cannot go on, and whatever else a
    worker raises: here nobody takes its place.
    """
    validate(config)
    exact_float32()
    device, started = "cuda" if torch.cuda.is_available() else "cpu", time.time()
    run_dir = Path(config.run.dir) / config.run.name
    with RunLock(run_dir), ExitStack() as closing:  # whatever ends the run, in a notebook, too
        closing.enter_context(disk_stops_the_run(run_dir))
        check_resume(run_dir, config, list(prompts))
        learner = Learner.load(config, device)
        policy = Policy.load(config.model, config.sampling, config.run.seed, device, trainable=False)
        rewards = _tried_rewards(config, prompts, policy.image_size)
        replay = Replay(config, learner.objective.needs) if config.run.replay else None
        stored, scores = (replay.rollout, replay.scores) if replay else (None, None)
        plan = replay.plan(config, prompts) if replay else plan_of(config, prompts)
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

        trainer.begin()
        sampler.begin()
        if replay:
            replay.check(publisher.log.rows)  # of the batch before, where it ended there
        while not (buffer.finished or publisher.stops):
            publisher.step(buffer.news())
            buffer.slow(publisher.lr_halvings)
            found_work = []
            for worker, threads in workers:
                torch.set_num_threads(threads)  # last bits depend on it
                try:
                    found_work.append(worker.step())
                except NothingScored:  # a new process would try next, and here is only this one
                    found_work.append(True)
            if replay:
                replay.check(publisher.log.rows)
            assert any(found_work), f"nobody has anything to do: {buffer.news()}"
        publisher.step(buffer.news())
        publisher.save_lora()
        record_sitting(run_dir, buffer.epoch, started, by_place({name: clock.read() for name, clock in clocks.items()}))
        write_report(run_dir)
        if buffer.finished:
            record_end(run_dir, config.run.batches)
    return run_dir


def _tried_rewards(config: Config, prompts: Sequence[str], image_size: tuple[int, int]) -> list[NamedReward]:
    rewards = [resolve(name, reward.path, reward.args) for name, reward in config.rewards.items()]
    for reward in rewards:
        try_out(reward, prompts, image_size)
    return rewards


def ending(run_dir: Path, config: Config) -> str:
    """How a run ended and what it did for its reward, in words."""
    why = why_stopped(RunFolder(run_dir), config)
    ended = f"{why}\n{outcome(run_dir, 'stopped')}" if why else outcome(run_dir)
    return f"{ended}\nreport: {run_dir / 'report.html'}"


def main(arguments: list[str]) -> int:
    print_anywhere()
    if {"-h", "--help"} & {*arguments}:
        print(f"{__doc__}\n{help_text()}")
        return 0
    try:
        config = load(arguments)
        print(ending(run(config, prompts_of_run(config)), config))
    except (UserError, RunStopped) as reason:
        print(f"workers.local: {in_one_line(reason)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
