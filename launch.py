"""Finetune a text-to-image diffusion model by reinforcement learning: `python launch.py compressibility`.

    settings and model checked ──► run folder (or its mirror) ──► cluster ──► rewards tried ──► actors ──► training loop
                   ──► LoRA and report                                                       (the rest is actors/run.py)

`python launch.py --help` lists experiments and settings. The same command on an existing run goes on with it.
"""

import contextlib
import sys
from pathlib import Path

from common.errors import RunStopped, UserError, in_one_line
from common.terminal import print_anywhere
from common.version import VERSION


def main(arguments: list[str]) -> int:
    """The exit code: 0 when the run is finished or was stopped by Ctrl-C, 2 with a sentence when it cannot go on."""
    print_anywhere()
    if arguments == ["--version"]:
        print(f"ddpo-ray {VERSION}")
        return 0
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
        with contextlib.suppress(BrokenPipeError):  # `--help | head`
            print(help_text(), flush=True)
        return 0
    try:
        if arguments[0] == "--scale":
            print(ask(Path(arguments[1]) if len(arguments) > 1 else Path(), arguments[2:]))
            return 0
        config = load(arguments)
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
        if config.run.replay:  # there is nothing for a cluster to do
            from workers import local

            print(local.ending(local.run(config, prompts), config))
            return 0
        from actors.run import run  # not above: Ray, torch and diffusers take ten seconds that a typo need not wait for

        run(config, prompts)
    except (UserError, RunStopped) as reason:
        print(f"launch.py: {in_one_line(reason)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("launch.py: stopped at once; the same command goes on from the last recovery point", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
