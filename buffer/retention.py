"""Which files of a run are needed: everything that the state names and somebody may still ask for."""

from buffer.rules import Rules
from buffer.state import State


def needed_files(rules: Rules, state: State) -> set[str]:
    """Paths in the run folder; whatever else bears a run's own names was never acknowledged, or is needed no more."""
    needed = {trained.parquet for trained in state.trained} | {path for path in state.evaluations.values() if path}
    if state.trained:
        needed |= {state.trained[version].recovery_point for version in rules.kept(state)}
    for work in state.work.values():
        needed |= {work.table.path} if work.table else set()
        needed |= {score.file.path for score in work.scores}
    return needed


def old_recovery_points(rules: Rules, state: State) -> list[str]:
    """Recovery points that count and are kept no longer. Never one that is being written, which the state cannot name:
    a later `trained` is journaled before anything is in this list (rule 14)."""
    old = set(range(len(state.trained))) - rules.kept(state)
    return [state.trained[version].recovery_point for version in sorted(old)]
