"""From the config's words to a reward."""

from collections.abc import Mapping
from typing import Any

from common.errors import UserError
from common.precision import settings_kept
from rewards.base import NamedReward
from rewards.paths import REWARDS


def resolve(name: str, path: str, args: Mapping[str, Any]) -> NamedReward:
    """The reward `name` of the config: `path` is built in or "module:Class", `args` its keyword arguments.

    Raises UserError naming the reward and what to change; an error of the device or of memory, which no change mends,
    as it is.
    """
    with settings_kept():
        reward = REWARDS.make(f"rewards.{name}.path", path, (), f"rewards.{name}.args", args)
    if not callable(reward):
        raise UserError(f"rewards.{name}.path={path} cannot be called; give the class a method {REWARDS.method}.")
    return NamedReward(name, reward)
