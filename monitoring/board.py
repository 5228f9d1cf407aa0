"""The Grafana dashboard without Grafana: its panels, their queries, and Prometheus' answers as charts on one page.

    python -m monitoring.board http://127.0.0.1:9090 mine board.html

draws the run `mine` from its first scrape in the last day to its last.
"""

import html
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report.svg import Curve, chart

BOARD = Path(__file__).resolve().parent / "grafana" / "ddpo_dashboard.json"
DAY_S = 86400.0
POINTS = 300  # of a line
PAGE = """<!doctype html><meta charset="utf-8"><title>{run}</title><style>
:root {{ --c0: #3557d6; --c1: #c2562d; --c2: #0f8a6a; --c3: #8b46b5; --c4: #a07a00; --c5: #8f98b8; }}
body {{ font: 13px system-ui, sans-serif; margin: 16px; color: #22222a; }}
main {{ display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; }}
h1, h2 {{ grid-column: 1 / -1; font-size: 15px; margin: 6px 0 0; }}
h3 {{ font-size: 13px; margin: 0; }}
div {{ border: 1px solid #e6e4df; border-radius: 6px; padding: 8px; }}
svg {{ width: 100%; display: block; overflow: visible; }}
.tick {{ font-size: 10px; fill: #6d6d78; }} .rule {{ stroke: #e6e4df; }}
.c0 {{ --c: var(--c0); }} .c1 {{ --c: var(--c1); }} .c2 {{ --c: var(--c2); }}
.c3 {{ --c: var(--c3); }} .c4 {{ --c: var(--c4); }} .c5 {{ --c: var(--c5); }}
polyline {{ fill: none; stroke: var(--c); stroke-width: 2; }} circle {{ fill: var(--c); }}
span {{ color: var(--c); margin-right: 10px; font-size: 11px; display: inline-block; }}
</style><main><h1>ddpo-ray · {run}</h1>{rows}</main>
"""


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


def page(prometheus: str, run: str) -> str:
    """HTML of all panels; time runs in seconds from the run's first scrape. Raises SystemExit for a run without any."""
    now = time.time()
    seen = ask(prometheus, Query(f'max(ray_ddpo_batches{{run="{run}"}})', ""), now - DAY_S, now, 10.0)
    if not seen:
        raise SystemExit(f"Prometheus at {prometheus} knows no run {run} in the last day")
    start, end = seen[0].times[0] - 10, seen[0].times[-1]
    rows = "".join(
        f"<h2>{html.escape(title)}</h2>" + "".join(drawn(panel, prometheus, start, end) for panel in row)
        for title, row in panels(run).items()
    )
    return PAGE.format(run=html.escape(run), rows=rows)


def drawn(panel: Panel, prometheus: str, start: float, end: float) -> str:
    """One panel: title, lines, legend."""
    step = max(1.0, (end - start) / POINTS)
    lines = [series for query in panel.queries for series in ask(prometheus, query, start, end, step)]
    curves = [Curve(line.legend, [t - start for t in line.times], line.values) for line in lines]
    legend = "".join(f'<span class="c{i % 6}">{html.escape(line.legend)}</span>' for i, line in enumerate(lines))
    svg = chart(curves, width=420, height=170, x_label="s") or "no data"
    return f"<div><h3>{html.escape(panel.title)}</h3>{svg}{legend}</div>"


def _filled(legend: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python -m monitoring.board PROMETHEUS_URL RUN FILE.html")
    try:
        Path(sys.argv[3]).write_text(page(sys.argv[1], sys.argv[2]), encoding="utf-8")
    except urllib.error.URLError as error:
        raise SystemExit(f"no Prometheus answers at {sys.argv[1]} ({error.reason})") from error
