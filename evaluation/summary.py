"""Before and after, on the fixed evaluation set: the same (prompt, seed) pairs at every evaluated version.

Because pairs are the same, the gain is judged by the differences within pairs, whose spread is smaller than that
between pictures. Its size is given in standard deviations of the rewards before, over those pairs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from buffer.run_folder import RunFolder
from evaluation.measures import kept, measures, pairs_of


@dataclass(frozen=True)
class Point:
    """An evaluation's mean."""

    version: int
    count: int  # pictures, or prompts, that have a value
    mean: float
    standard_error: float  # of the mean, over pairs; nan for a single pair


@dataclass(frozen=True)
class Comparison:
    """Two versions over the pairs that have a reward at both."""

    reward: str  # the column: "reward" is the weighted sum that was trained on
    before: int  # version
    after: int
    count: int  # pairs
    before_mean: float
    before_std: float  # over pairs, with n - 1
    after_mean: float
    after_std: float
    difference: float  # mean of after - before within pairs
    standard_error: float  # of that mean; nan for a single pair

    @property
    def gain(self) -> float:
        """The difference in standard deviations of the rewards before; nan where they do not vary."""
        return self.difference / self.before_std if self.before_std > 0 else math.nan

    @property
    def why_no_gain(self) -> str:
        """What to say in the place of a gain that is not finite."""
        if self.count == 1:
            return "a single pair has no standard deviation"
        return "the rewards before did not vary, so there is no standard deviation to compare with"

    @property
    def pairs(self) -> str:
        return f"{self.count} fixed pair{'s' if self.count != 1 else ''} of prompt and seed"


def in_words(change: Comparison | None, how: str = "finished") -> str:
    """What a run did for its reward, in a sentence that begins with how it ended."""
    if change is None:
        return f"{how}; no evaluation to compare"
    error, gain = "from a single pair no error can be given", change.why_no_gain
    if math.isfinite(change.standard_error):
        error = f"with a standard error of {change.standard_error:.4f}"
    if math.isfinite(change.gain):
        size = f"{change.gain:+.2f}" if abs(change.gain) >= 0.005 else "less than 0.01"
        gain = f"{size} standard deviations of the rewards before"
    return (
        f"{how}: over {change.pairs} the mean reward went from {change.before_mean:z.4f} to "
        f"{change.after_mean:z.4f}, by {change.difference:+z.4f} {error}: {gain}"
    )


def outcome(run_dir: Path, how: str = "finished") -> str:
    """What a run did for its reward: a sentence on its last version, and one on the best where that is another."""
    run = RunFolder(run_dir)
    found, best = run.evaluations, run.best
    sentences = [in_words(compare_tables(found), how)]
    if best is not None and best in found and best < max(found):
        change = compare_tables({version: table for version, table in found.items() if version <= best})
        inside = f"version {best}, the best, in {run_dir / 'lora_best'}"
        sentences.append(in_words(change, inside) if change else f"{inside}: no later one is better")
    return "\n".join(sentences)


def curve(evaluations: dict[int, pa.Table], measure: str = "reward") -> list[Point]:
    """The mean of a measure (evaluation/measures.py) at each evaluated version; those without it are left out."""
    found = {version: measures(table).get(measure, np.empty(0)) for version, table in evaluations.items()}
    return [
        Point(version, len(values), float(values.mean()), standard_error(values))
        for version, values in found.items()
        if len(values)
    ]


def compare(run_dir: Path, reward: str = "reward") -> Comparison | None:
    """The first evaluated version against the last. None while fewer than two share a pair."""
    return compare_tables(RunFolder(run_dir).evaluations, reward)


def compare_tables(evaluations: dict[int, pa.Table], reward: str = "reward") -> Comparison | None:
    """As `compare`, of tables that are read already."""
    if len(evaluations) < 2:
        return None
    first, last = min(evaluations), max(evaluations)
    before, after = _by_pair(evaluations[first], reward), _by_pair(evaluations[last], reward)
    pairs = [pair for pair in before if pair in after]
    if not pairs:
        return None
    old, new = (np.array([rewards[pair] for pair in pairs], dtype=np.float64) for rewards in (before, after))
    return Comparison(
        reward=reward,
        before=first,
        after=last,
        count=len(pairs),
        before_mean=float(old.mean()),
        before_std=_std(old),
        after_mean=float(new.mean()),
        after_std=_std(new),
        difference=float((new - old).mean()),
        standard_error=standard_error(new - old),
    )


def by_prompt(evaluations: dict[int, pa.Table]) -> list[tuple[str, float, float]]:
    """(prompt, mean reward before, after) over the pairs of each prompt, the largest rise first."""
    if len(evaluations) < 2:
        return []
    before, after = (_by_pair(evaluations[v], "reward") for v in (min(evaluations), max(evaluations)))
    prompts: dict[str, list[tuple[float, float]]] = {}
    for pair in before.keys() & after.keys():
        prompts.setdefault(pair[0], []).append((before[pair], after[pair]))
    means = [(prompt, *np.mean(values, axis=0).tolist()) for prompt, values in prompts.items()]
    return sorted(means, key=lambda row: (row[1] - row[2], row[0]))


def _by_pair(table: pa.Table, reward: str) -> dict[tuple[str, int], float]:
    """(prompt, seed) -> reward, without what was set aside."""
    rows = kept(table)
    values = zip(pairs_of(rows), rows[reward].to_pylist(), strict=True)
    return {pair: value for pair, value in values if value is not None}


def _std(values: np.ndarray) -> float:
    """With n - 1; exactly 0 of equal values, whose mean may round to another; nan of a single one."""
    if len(values) > 1 and (values == values[0]).all():
        return 0.0
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def standard_error(values: np.ndarray) -> float:
    """Of the mean of `values`; nan for a single one."""
    return _std(values) / math.sqrt(len(values))
