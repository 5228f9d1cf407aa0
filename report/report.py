"""report.html: one self-contained page that shows what a run did. `write_report(run_dir)` at any time.

python -m report.report runs/compressibility
"""

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from buffer.run_folder import RunFolder, run_at
from common.commands import command, path_of
from common.files import write_atomically
from conf.evaluations import FIRST, scale_set
from report import evaluations, sections

PAGE = Path(__file__).resolve().parent / "page.html"


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html and gives its path. Raises common.errors.UserError if run_dir is no run's folder."""
    run = RunFolder(run_dir)
    page = Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(run.name),
        headline=sections.headline(run),
        cards=sections.cards(run),
        pictures=pictures(run),
        reward=evaluations.reward_curve(run) + evaluations.of_first_set(run) + evaluations.guard(run),
        scales=scales(run),
        sets="".join(further_set(run, name) for name in run.sets if name not in (FIRST, *_scale_sets(run))),
        curves=sections.curves(run),
        prompts=sections.prompts(run),
        time=sections.where_time_went(run),
        settings=sections.settings(run),
        machine=sections.machine(run),
        usage=sections.usage(run, run_dir),
    )
    report = run_dir / "report.html"
    write_atomically(report, page)
    return report


def pictures(run: RunFolder) -> str:
    """The first and the last grid side by side, and a slider through all of them."""
    if not (grids := run.grids[FIRST]):
        return ""
    versions = spread(sorted(grids), 12)
    sources = {version: _source(grids[version]) for version in versions}
    first, last = versions[0], versions[-1]
    if first == last:
        only = _figure(sources[first], _after(first))
        return f'<section><h2>Pictures</h2><div class="pair">{only}</div></section>'
    frames = "".join(
        f'<img src="{sources[v]}" data-version="{v}" alt="pictures at version {v}">' for v in versions[1:-1]
    )
    pair = _figure(sources[first], _after(first)) + _figure(sources[last], _after(last), "after")
    aside = any(rows["set_aside"].null_count < len(rows) for rows in run.evaluations.values())
    grey = "; a grey cell was set aside" if aside else ""
    slider = (
        f'<label class="slider">on the right: <output>version {last}</output>'
        f'<input type="range" min="0" max="{len(versions) - 1}" value="{len(versions) - 1}"></label>'
    )
    return (
        f"<section><h2>Before and after</h2><p>Every cell is the same prompt and the same seed in both grids{grey}.</p>"
        f'<div class="pair">{pair}</div>{slider}<div class="frames" hidden>{frames}</div></section>'
    )


def scales(run: RunFolder) -> str:
    """The last version with its LoRA at several scales, and what `python -m evaluation` has drawn."""
    grids = {name: list(run.grids.get(name, {}).values()) for name in _scale_sets(run)}
    figures = "".join(
        _figure(_source(paths[-1]), f"the LoRA at {name.removeprefix('scale_')} %")
        for name, paths in grids.items()
        if paths
    )
    pictures = f'<div class="pair">{figures}</div>' if figures else ""
    drawing, grid = run.path / "scales" / "tradeoff.svg", run.path / "scales" / "pictures.png"
    if drawing.exists() and grid.exists():
        source = f"data:image/svg+xml;base64,{base64.b64encode(drawing.read_bytes()).decode()}"
        pictures += f'<img src="{source}" alt="what is gained against what is lost">'
        pictures += _figure(_source(grid), "the same prompts and seeds at each scale, a row each", "")
    body = evaluations.of_scales(run) + pictures
    return f"<section><h2>By the LoRA's scale</h2>{body}</section>" if body else ""


def _scale_sets(run: RunFolder) -> list[str]:
    return [scale_set(scale) for scale in run.config.evaluation.scales]


def further_set(run: RunFolder, name: str) -> str:
    """What the report says of an evaluation set besides the first: its rewards, and its first and last grid."""
    grids = run.grids.get(name, {})
    versions = [min(grids), max(grids)] if grids else []
    figures = "".join(_figure(_source(grids[version]), _after(version)) for version in dict.fromkeys(versions))
    pair = f'<div class="pair">{figures}</div>' if figures else ""
    return f"<section><h2>Evaluation set {html.escape(name)}</h2>{evaluations.of_set(run, name)}{pair}</section>"


def _source(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _after(version: int) -> str:
    return f"after {version} batch{'es' if version != 1 else ''}" if version else "before training"


def spread(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spread, with the first and the last."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _figure(source: str, caption: str, name: str = "before") -> str:
    return f'<figure class="{name}"><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


@command("report.report")
def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m report.report", description=__doc__)
    parser.add_argument("run", type=path_of)
    print(write_report(run_at(parser.parse_args(arguments).run).path))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
