"""What the report says of evaluations: the reward, each set's other measures, and what the guard saw."""

import html
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from buffer.run_folder import RunFolder
from conf.evaluations import scale_set
from evaluation.guard import best_by
from evaluation.history import history, verdict
from evaluation.measures import measures, pairs_of, reward_names
from evaluation.summary import compare_tables, curve, standard_error
from report.sections import MEAN_REWARD, series, signed, table
from report.svg import Curve, chart, number


def reward_curve(run: RunFolder) -> str:
    """The reward of training batches and of the evaluation set, and what each single reward did."""
    batches, values = series(run.batches, MEAN_REWARD)
    curves, points = [_evaluation_curve(run.evaluations, "reward", "evaluation set")], curve(run.evaluations)
    if batches:
        curves.append(Curve("training batch", batches, values, kind="faint"))
    baseline = points[0].mean if points and points[0].version == 0 else None
    drawing = chart(curves, width=980, height=340, x_label="batches trained", baseline=baseline)
    if not drawing:
        return ""
    legend = '<p class="legend"><span class="c0">● evaluation set, mean ± standard error</span>'
    legend += '<span class="c1">— training batches</span>' if batches else ""
    legend += "<span>┄ before training</span>" if baseline is not None else ""
    return f"<section><h2>Reward</h2>{legend}</p>{drawing}{_comparison_table(run.evaluations)}</section>"


def of_first_set(run: RunFolder) -> str:
    """What else is measured on the run's own pairs: rewards that nobody trains on, what rewards store, diversity."""
    names = _names(run.evaluations)
    trained = [name for name in names if name in run.config.rewards and run.config.rewards[name].weight]
    further = [name for name in names if [name] != trained]
    charts = _charts(run.evaluations, further)
    return f'<section><h2>Beside the reward</h2><div class="grid">{charts}</div></section>' if charts else ""


def of_set(run: RunFolder, name: str) -> str:
    """A chart of each measure of a further set, and before and after."""
    evaluations = run.sets[name]
    charts = _charts(evaluations, _names(evaluations))
    return f'<div class="grid">{charts}</div>{_comparison_table(evaluations)}'


def of_scales(run: RunFolder) -> str:
    """A chart of each measure by the scale of the last version's LoRA; "" where no scale was evaluated."""
    found = {scale: measures(rows) for scale, rows in by_scale(run).items()}
    names = next(iter(found.values()), {})
    values = {name: {scale: measured.get(name) for scale, measured in found.items()} for name in names}
    charts = "".join(
        f'<div class="small"><h3>{html.escape(name)}</h3>{drawing}</div>'
        for name, points in values.items()
        if (drawing := chart([_scale_curve(name, points)], width=320, height=150, x_label="scale"))
    )
    return f'<div class="grid">{charts}</div>' if charts else ""


def by_scale(run: RunFolder) -> dict[float, pa.Table]:
    """Rows of the same pairs by the scale of the LoRA: 0 is version 0, unless that began with a LoRA, 1 is the last;
    empty without scales."""
    scales = {scale: run.sets.get(scale_set(scale), {}) for scale in run.config.evaluation.scales}
    last = max((version for tables in scales.values() for version in tables), default=None)
    if last not in run.evaluations:
        return {}
    found = {scale: tables[last] for scale, tables in scales.items() if last in tables}
    pairs = {*pairs_of(next(iter(found.values())))}

    def of_pairs(rows: pa.Table) -> pa.Table:
        return rows.filter(pa.array([pair in pairs for pair in pairs_of(rows)]))

    ends = {1.0: of_pairs(run.evaluations[last])}
    if run.config.model.lora.init_from is None and 0 in run.evaluations:
        ends[0.0] = of_pairs(run.evaluations[0])
    return dict(sorted((found | ends).items()))


def _scale_curve(name: str, points: Mapping[float, np.ndarray | None]) -> Curve:
    there = {scale: values for scale, values in points.items() if values is not None}
    errors = [standard_error(values) for values in there.values()]
    return Curve(name, list(there), [float(values.mean()) for values in there.values()], "points", errors)


def guard(run: RunFolder) -> str:
    """Which version is the best, and what went wrong."""
    if not history(run.metrics):
        return ""
    found = verdict(run.metrics, run.config)
    best = f"The best version is {found.best}, by <code>{html.escape(best_by(run.config))}</code>"
    best += ": its LoRA is in <code>lora_best/</code>." if run.best == found.best else "."
    wrong = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in found.sentences)
    action = {"stop": "the run is ended", "slow": "the learning rate is halved", "note": "it is only said"}
    rule = f"<p>Where something goes wrong {action[run.config.guard.action]}:</p><ul>{wrong}</ul>" if wrong else ""
    return f"<section><h2>Guard</h2><p>{best}</p>{rule}</section>"


def _names(evaluations: Mapping[Any, pa.Table]) -> list[str]:
    """Measures of the first evaluation, but for the sum of rewards."""
    return [name for name in measures(evaluations[min(evaluations)]) if name != "reward"] if evaluations else []


def _charts(evaluations: dict[int, pa.Table], names: list[str]) -> str:
    drawings = {name: chart([_evaluation_curve(evaluations, name, name)], width=320, height=150) for name in names}
    return "".join(
        f'<div class="small"><h3>{html.escape(name)}</h3>{drawing}</div>'
        for name, drawing in drawings.items()
        if drawing
    )


def _evaluation_curve(evaluations: dict[int, pa.Table], measure: str, title: str) -> Curve:
    points = curve(evaluations, measure)
    versions, means = [float(point.version) for point in points], [point.mean for point in points]
    return Curve(title, versions, means, kind="points", errors=[point.standard_error for point in points])


def _comparison_table(evaluations: dict[int, pa.Table]) -> str:
    """The trained reward and each single one, before and after over the same pairs."""
    if not evaluations:
        return ""
    names = reward_names(evaluations[min(evaluations)])
    trained = compare_tables(evaluations, "reward")
    singles = [compare_tables(evaluations, name) for name in names] if len(names) > 1 or trained is None else []
    rows = [
        (
            change.reward,
            f"{number(change.before_mean)} ± {number(change.before_std)}",
            f"{number(change.after_mean)} ± {number(change.after_std)}",
            f"{signed(change.difference)} ± {number(change.standard_error)}",
            signed(change.gain),
            str(change.count),
        )
        for change in [trained, *singles]
        if change is not None
    ]
    head = ("", "before: mean ± std", "after: mean ± std", "difference ± standard error", "in stds before", "pairs")
    return table(head, rows) if rows else ""
