"""From the config's words to an objective and an advantage."""

from typing import Any, get_args

from common.doors import Door
from common.errors import UserError
from conf.schema import Config
from learner.advantages import Advantage
from learner.objectives.objective import Needs, Objective
from learner.paths import ADVANTAGES, OBJECTIVES


def objective_name(config: Config) -> str:
    """As learner.objective says, or else what suits the age of the data."""
    old_data = config.buffer.max_staleness > 1 or bool(config.run.replay)
    return config.learner.objective or ("ddpo_decoupled" if old_data else "ddpo_is")


def make_objective(config: Config) -> Objective:
    """Raises UserError if it cannot be made, or does not go with the other settings."""
    name = objective_name(config)
    given = (config.learner, config.run.seed)
    objective: Objective = _make(OBJECTIVES, "objective", name, given, config.learner.objective_args, Objective)
    if objective.needs not in get_args(Needs):
        raise UserError(f'learner.objective={name} has needs={objective.needs!r}; set "steps" or "clean".')
    if objective.needs == "steps" and not config.sampling.eta:
        raise UserError(
            f"learner.objective={name} with sampling.eta=0: without noise in its steps a path has no log-prob and no "
            "policy gradient, so set sampling.eta=1, or take a loss on clean pictures such as nft"
        )
    if config.learner.kl_weight and not objective.penalises_kl:
        raise UserError(
            f"learner.kl_weight={config.learner.kl_weight:g} with learner.objective={name}, whose loss has no penalty "
            "on the KL to the base model: set learner.kl_weight=0, or take ddpo_is"
        )
    if config.run.replay and not objective.takes_stale_data:
        raise UserError(
            f"learner.objective={name} with run.replay: its gradient holds only for fresh data, so take "
            "ddpo_decoupled, or a loss on clean pictures such as rwr"
        )
    steps, stale = config.learner.optimizer_steps, config.buffer.max_staleness
    if not objective.takes_stale_data and (steps > 1 or stale > 0):
        setting, value, fit = ("buffer.max_staleness", stale, 0) if stale else ("learner.optimizer_steps", steps, 1)
        raise UserError(
            f"learner.objective={name} with {setting}={value}: its gradient holds only for fresh data, so set "
            f"{setting}={fit}, or take ddpo_is"
        )
    return objective


def make_advantage(config: Config) -> Advantage:
    """Raises UserError if it cannot be made."""
    learner = config.learner
    made: Advantage = _make(ADVANTAGES, "advantage", learner.advantage, (learner,), learner.advantage_args, Advantage)
    return made


def _make(door: Door, kind: str, path: str, given: tuple[Any, ...], args: dict[str, Any], base: type) -> Any:
    if not issubclass(door.find(f"learner.{kind}={path}", path), base):
        raise UserError(
            f"learner.{kind}={path} is no {base.__name__}; let the class inherit from "
            f"{base.__module__}.{base.__name__}."
        )
    return door.make(f"learner.{kind}", path, given, f"learner.{kind}_args", args)
