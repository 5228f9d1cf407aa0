"""What a study reads from its cells: gains in base standard deviations, and what is left of the pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from buffer.run_folder import RunFolder
from conf.evaluations import FIRST
from evaluation.measures import measures
from evaluation.summary import curve, standard_error
from report.svg import Curve

Points = dict[int, float]  # by version


@cache
def run_of(path: Path) -> RunFolder:
    """Read once: a study asks for a run's rows many times."""
    return RunFolder(path)


def gains(path: Path, name: str = FIRST) -> Points:
    """The mean rise of the trained reward over the set's pairs, in standard deviations of the base model's."""
    run = run_of(path)
    evaluations = run.sets[name]
    base = measures(evaluations[min(evaluations)])["reward"]
    return {p.version: (p.mean - float(base.mean())) / float(base.std(ddof=1)) for p in curve(evaluations)}


def means(path: Path, measure: str, name: str = FIRST) -> Points:
    """The mean of a measure by version; of the judge the share of pictures that are right."""
    return {point.version: point.mean for point in curve(run_of(path).sets[name], measure)}


def last(points: Points) -> float:
    """At the highest version."""
    return points[max(points)]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds, which is nan for a single one."""
    return float(np.mean(values)), standard_error(np.asarray(values))


def shown(values: Sequence[float], form: str = "+.2f") -> str:
    mean, error = spread(values)
    return f"{mean:{form}} ± {error:{form.lstrip('+')}}" if np.isfinite(error) else f"{mean:{form}}"


def over_seeds(name: str, seeds: Sequence[Points], x: Callable[[int], float] = float) -> Curve:
    """Mean and standard error of the versions that all seeds have. x: from a version to where it is drawn."""
    versions = [version for version in seeds[0] if all(version in points for points in seeds)]
    spreads = [spread([points[version] for points in seeds]) for version in versions]
    return Curve(name, [x(v) for v in versions], [m for m, _ in spreads], "points", [e for _, e in spreads])


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed only: what each gains, and the share of pictures that the judge calls right."""

    gained: Sequence[Points]
    right: Sequence[Points]

    @classmethod
    def read(cls, paths: Sequence[Path], judged: str = "judge") -> "Seeds":
        return cls([gains(path) for path in paths], [means(path, judged) for path in paths])

    def frontier(self, name: str) -> Curve:
        """What is right against what is gained, by version, as means over seeds."""
        versions = [version for version in self.gained[0] if all(version in p for p in (*self.gained, *self.right))]

        def mean(seeds: Sequence[Points]) -> list[float]:
            return [float(np.mean([points[version] for points in seeds])) for version in versions]

        return Curve(name, mean(self.gained), mean(self.right), "points")

    def ends(self) -> list[str]:
        """Gain and share at the highest version, for a table."""
        return [shown([last(points) for points in self.gained]), shown([last(points) for points in self.right], ".2f")]


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """Markdown; the first column is the row's name."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join([name, *cells])} |" for name, cells in rows.items()])
