"""What a run's metrics say of each evaluated version: the guard's view of a run, under way or finished."""

from collections.abc import Iterable, Mapping

from evaluation.guard import Measured, Seen


def history(rows: Iterable[Mapping[str, float]]) -> list[Seen]:
    """By ascending version. rows: of metrics.jsonl, in any order.

    The KL of a version is that of the version before: it is measured as a batch comes to be trained, and the batch that
    a version is trained on comes later than its evaluation.
    """
    measured: dict[int, dict[str, Measured]] = {}
    kl: dict[int, float] = {}
    for row in rows:
        if "batch" in row and "kl/base" in row:
            kl[int(row["batch"]) + 1] = row["kl/base"]
        for key, mean in row.items():
            if key.startswith("evaluation/") and key.endswith("/mean"):
                _, name, measure, _ = key.split("/")
                std = row.get(f"evaluation/{name}/{measure}/std", 0.0)
                measured.setdefault(int(row["version"]), {})[f"{name}/{measure}"] = Measured(mean, std)
    return [Seen(version, measured[version], kl.get(version)) for version in sorted(measured)]
