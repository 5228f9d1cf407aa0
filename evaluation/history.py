"""What a run's metrics say of each evaluated version: the guard's view of a run, under way or finished."""

import math
from collections.abc import Iterable, Mapping

from buffer.run_folder import RunFolder
from conf.schema import Config
from evaluation.guard import Measured, Seen, Verdict, best_by, judge, stops


def history(rows: Iterable[Mapping[str, float]]) -> list[Seen]:
    """By ascending version. rows: of metrics.jsonl, in any order.

    The KL of a version is that of the version before: it is measured as a batch comes to be trained, and the batch that
    a version is trained on comes later than its evaluation.
    """
    measured: dict[int, dict[str, Measured]] = {}
    kl: dict[int, float] = {}
    for row in rows:
        if "batch" in row and (kl or "kl/base" in row):  # a KL that is not finite has no place in a row
            kl[int(row["batch"]) + 1] = row.get("kl/base", math.inf)
        for key, mean in row.items():
            if key.startswith("evaluation/") and key.endswith("/mean"):
                name = key.removeprefix("evaluation/").removesuffix("/mean")  # <set>/<measure>
                std = row.get(f"evaluation/{name}/std", 0.0)
                measured.setdefault(int(row["version"]), {})[name] = Measured(mean, std)
    return [Seen(version, measured[version], kl.get(version)) for version in sorted(measured)]


def verdict(rows: Iterable[Mapping[str, float]], config: Config) -> Verdict:
    """What the guard of `config` says of these rows of metrics.jsonl."""
    return judge(history(rows), config.guard, best_by(config))


def why_stopped(run: RunFolder, config: Config) -> str:
    """Why the guard of `config` ends the run; "" where it is finished, or may go on."""
    if run.record.get("finished") == config.run.batches:
        return ""
    return stops(verdict(run.metrics, config), config.guard)


def is_over(run: RunFolder, config: Config) -> str:
    """That there is nothing to do, and how to train on, in words; "" where there is: a run that is finished or stopped
    by the guard has left all that it leaves."""
    if run.record.get("finished") == config.run.batches:
        return (
            f"{run.path} is finished, all {config.run.batches} batches are trained: see {run.path}/report.html\n"
            f"To train on, give the same command with run.batches={2 * config.run.batches}"
        )
    if (why := why_stopped(run, config)) and run.best is not None and (run.path / "report.html").exists():
        return f"{why}: the guard stops {run.path}\nTo train on, give the same command with guard.action=note"
    return ""
