"""Which names rewards and evaluation sets may have: they become columns, keys of metrics, files and labels, and must
clash with none.

Databases and some file systems do not tell A from a, and metrics write _ for -; so names are compared without either.
"""

import re
from collections.abc import Iterable

from common.errors import UserError, quoted, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
# What stands beside a reward's column in the files of trajectories and evaluations, and in a batch.
COLUMNS = frozenset(
    "trajectory_id order_id batch prompt prompt_id seed policy_version policy_digest age age_in_flight reward "
    "advantage set_aside claimed rolled_out scored trained latents timesteps log_probs image score".split()
)
METRICS = frozenset({"mean", "std", "std_per_prompt"})  # reward/mean is that of the batch, not of a reward named mean
MEASURES = frozenset({"diversity"})  # of evaluations, beside each reward's


def check_name(group: str, name: str) -> None:
    """Raises UserError for a name that no reward ("rewards"), or no evaluation set ("evaluation.sets"), can have."""
    if not NAME.fullmatch(name):
        what = "a reward" if group == "rewards" else "an evaluation set"
        raise UserError(
            f"{group}.{shown(name)}: {quoted(name)} cannot be {what}, whose name is of letters, digits, '_' and '-', "
            "at most 100, and begins with a letter or digit: rename it"
        )
    if group == "rewards" and folded(name) in COLUMNS | METRICS | MEASURES:
        raise UserError(
            f"rewards.{name}: {name!r} cannot be a reward, as a column or metric of every run has that name: rename it"
        )


def check_different(group: str, names: Iterable[str]) -> None:
    """Raises UserError for two rewards, or evaluation sets, that somewhere would be one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(folded(name), name)
        if other != name:
            raise UserError(
                f"{group}.{other} and {group}.{name} differ only in case or in - and _, which databases and metrics do "
                "not tell apart: rename one"
            )


def folded(name: str) -> str:
    return name.casefold().replace("-", "_")
