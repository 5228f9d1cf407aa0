"""Finetune a text-to-image diffusion model by reinforcement learning: `python launch.py compressibility`.

    settings and model checked ──► run folder (or its mirror) ──► cluster ──► rewards tried ──► actors ──► training loop
                   ──► LoRA and report                                                       (the rest is actors/run.py)

`python launch.py --help` lists experiments and settings. The same command on an existing run goes on with it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from common.commands import AGAIN, command
from common.version import VERSION


@command("launch.py", interrupted=AGAIN)
def main(arguments: Sequence[str]) -> None:
    """Until the run is finished, is stopped by Ctrl-C or its guard, or cannot go on."""
    if [*arguments] == ["--version"]:
        print(f"ddpo-ray {VERSION}")
        return
    # Not above, as the version is there without them.
    from conf.load import help_text, load
    from conf.prompts import prompts_of_run
    from conf.resume import check_resume
    from conf.scale import ask
    from conf.validate import validate
    from learner.paths import ADVANTAGES, OBJECTIVES
    from policy.source import check_model
    from rewards.paths import REWARDS

    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    if arguments[0] == "--scale":
        print(ask(Path(arguments[1]) if len(arguments) > 1 else Path(), [*arguments[2:]]))
        return
    config = load([*arguments])
    validate(config)
    check_model(config.model)
    prompts = prompts_of_run(config)
    check_resume(Path(config.run.dir) / config.run.name, config, prompts)
    if config.ray.address is None:  # else it may be there on the hosts of the cluster alone
        for name, reward in config.rewards.items():
            REWARDS.locate(f"rewards.{name}.path={reward.path}", reward.path)
    if config.learner.objective is not None:
        OBJECTIVES.locate(f"learner.objective={config.learner.objective}", config.learner.objective)
    ADVANTAGES.locate(f"learner.advantage={config.learner.advantage}", config.learner.advantage)
    if config.run.replay:
        from buffer.sources import sources, stored

        stored(sources(config), config)
        from workers import local  # there is nothing for a cluster to do

        print(local.ending(local.run(config, prompts), config))
        return
    from actors.run import run  # not above: Ray, torch and diffusers take ten seconds that a typo need not wait for

    run(config, prompts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
