"""The dashboard without Grafana: every panel's queries, answered by Prometheus, as charts on one page.

    python -m monitoring.board_picture http://127.0.0.1:9090 mine board.html

draws the run `mine` from its first scrape in the last day to its last.
"""

import html
import sys
import time
import urllib.error
from pathlib import Path

from monitoring.board import Panel, Query, ask, panels
from report.svg import Curve, chart

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


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit("usage: python -m monitoring.board_picture PROMETHEUS_URL RUN FILE.html")
    try:
        Path(sys.argv[3]).write_text(page(sys.argv[1], sys.argv[2]), encoding="utf-8")
    except urllib.error.URLError as error:
        raise SystemExit(f"no Prometheus answers at {sys.argv[1]} ({error.reason})") from error
