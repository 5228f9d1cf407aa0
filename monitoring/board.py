"""The Grafana dashboard as data: its panels, their queries with the variables filled in, and the answers to them."""

import json
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD = Path(__file__).resolve().parent / "grafana" / "ddpo_dashboard.json"


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expr: str  # PromQL
    legend: str  # with {{label}} where a label's value goes


@dataclass(frozen=True)
class Panel:
    """One chart of the dashboard."""

    title: str
    description: str
    unit: str  # Grafana's name of it
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Series:
    """One line of a panel; times in unix seconds."""

    legend: str
    times: Sequence[float]
    values: Sequence[float]


def panels(run: str) -> dict[str, list[Panel]]:
    """The panels of each row by the row's title, in the dashboard's order. run: a regular expression, `.*` for all."""
    rows: dict[str, list[Panel]] = {}
    for item in json.loads(BOARD.read_text(encoding="utf-8"))["panels"]:
        if item["type"] == "row":
            rows[item["title"]] = []
            continue
        queries = tuple(Query(t["expr"].replace("$run", run), t["legendFormat"]) for t in item["targets"])
        unit = item["fieldConfig"]["defaults"]["unit"]
        rows[list(rows)[-1]].append(Panel(item["title"], item["description"], unit, queries))
    return rows


def ask(prometheus: str, query: Query, start: float, end: float, step: float) -> list[Series]:
    """What `query` was from `start` to `end` (unix seconds), every `step` seconds; [] where there was nothing.

    prometheus: its URL. Raises urllib.error.HTTPError for a query that is none.
    """
    asked = urllib.parse.urlencode({"query": query.expr, "start": start, "end": end, "step": step})
    with urllib.request.urlopen(f"{prometheus}/api/v1/query_range?{asked}", timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return [
        Series(
            _filled(query.legend, result["metric"]),
            [float(time) for time, _ in result["values"]],
            [float(value) for _, value in result["values"]],
        )
        for result in found
    ]


def _filled(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend
