"""What can be refused of a run, or should be said of it, before any work: without Ray, and before a weight is read."""

from collections.abc import Sequence

from buffer.settings import plan_of
from common.errors import UserError
from conf.evaluations import sets_of
from conf.schema import Config
from learner.registry import make_advantage, make_objective
from policy.check import Checked, check_policy, of_the_users_own
from policy.source import family_of


def check_run(config: Config, prompts: Sequence[str]) -> Checked:
    """Raises UserError if objective or advantage cannot be made, or the model cannot have LoRA, prompts or sampling, be
    it those of an evaluation set."""
    make_objective(config), make_advantage(config)
    checked = check_policy(config.model, config.sampling, prompts)
    checked.remarks.extend(_check_sets(config, prompts))
    return checked


def _check_sets(config: Config, prompts: Sequence[str]) -> list[str]:
    family, remarks = family_of(config.model), []
    for fixed, one in zip(plan_of(config, prompts).sets, sets_of(config).values(), strict=True):
        try:
            with of_the_users_own(config.model):
                if one.sampling != config.sampling:
                    family.check(config.model, one.sampling)
                if fixed.prompts != tuple(prompts):
                    remarks += family.check_prompts(config.model, fixed.prompts)
        except UserError as error:
            raise UserError(f"evaluation.sets.{fixed.name}: {error}") from error
    return remarks
