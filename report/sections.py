"""The sections of the report: functions from what was read of a run to a piece of HTML, "" if there is nothing."""

import dataclasses
import html
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from buffer.run_folder import RunFolder
from common.errors import UserError
from common.machine import describe, machine_info
from conf.places import portable
from conf.schema import Config, RewardConfig
from conf.settings import flatten
from evaluation.history import why_stopped
from evaluation.summary import by_prompt, compare_tables
from policy.source import BUILT_IN, class_name
from report.svg import Curve, chart, number

# Curves with a title and a sentence of their own; the other keys of the metrics follow, folded away.
PANELS: tuple[tuple[str, str, str], ...] = (
    ("KL to the base model", "kl/base", "How far the finetuned sampler has moved, in nats a trajectory."),
    ("Clipped", "clip_fraction", "Share of (trajectory, step) pairs whose ratio left the clip range."),
    ("Log-prob gap", "ratio/gap", "Largest |log ratio| of fresh data before the first update; 0 is right."),
    ("Age of the data", "age/max", "Versions between rollout and training, at most."),
    ("Spread within a prompt", "reward/std_per_prompt", "Mean per-prompt std of the reward."),
    ("Pictures per second", "images_per_s", "Rolled out, scored and trained on."),
    ("Gradient norm", "grad_norm", "Before it is clipped."),
)
MEAN_REWARD = "reward/mean"


def headline(run: RunFolder) -> str:
    """The result in a sentence."""
    total = run.config.run.batches
    done = f"{len(run.batches)} of {total} batches"
    change = compare_tables(run.evaluations)
    if change is None:
        return f"{done} trained; no two evaluations to compare yet."
    before, after = f"<b>{number(change.before_mean)}</b>", f"<b>{number(change.after_mean)}</b>"
    moved = f"{'rose' if change.difference > 0 else 'fell'} from {before} to {after}"
    if change.difference == 0:
        moved = f"stayed at {after}"
    gain = f", {signed(change.gain)} standard deviations of the rewards before"
    if not math.isfinite(change.gain):
        gain = "" if change.count == 1 else ", from rewards that did not vary"
    small = abs(change.difference) < change.standard_error
    doubt = ", which is less than the standard error of the change" if small else ""
    stopped = why_stopped(run, run.config)
    end = f" The run was stopped: {html.escape(stopped)}." if stopped else ""
    return f"In {done} the mean reward over {change.pairs} {moved}{gain}{doubt}.{end}"


def cards(run: RunFolder) -> str:
    """The few numbers that come first."""
    change = compare_tables(run.evaluations)
    facts: list[tuple[str, str, str]] = []
    if change is not None and math.isfinite(change.gain):
        error = f"± {number(change.standard_error / change.before_std)} standard error"
        facts.append((signed(change.gain), "standard deviations gained", error))
    rows = run.trajectories(["age", "set_aside"])
    facts.append((f"{len(run.batches)} / {run.config.run.batches}", "batches", f"{len(rows):,} trajectories"))
    seconds = sum(sitting["ended"] - sitting["started"] for sitting in run.sittings)
    if seconds:
        sittings = f"{len(run.sittings)} sitting{'s' if len(run.sittings) != 1 else ''}"
        facts.append((duration(seconds), "wall clock", sittings))
    ages = [age for age in rows["age"].to_pylist() if age is not None]
    if ages:
        facts.append((str(max(ages)), "largest age", f"allowed: {run.config.buffer.max_staleness}"))
    reasons = [reason for table in (rows, *run.evaluations.values()) for reason in table["set_aside"].to_pylist()]
    aside = Counter(reason for reason in reasons if reason)
    commonest = ", ".join(f"{reason}: {count}" for reason, count in aside.most_common(2))
    facts.append((str(aside.total()), "pictures set aside", commonest))
    restarts = sum(sitting.get("restarts", 0) for sitting in run.sittings)
    facts += [(str(restarts), "workers restarted", "")] if restarts else []
    return "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(note[:80])}</small></div>"
        for value, name, note in facts
    )


def curves(run: RunFolder) -> str:
    """Small charts of every key in the metrics: those that need a sentence first, the others folded away."""
    keys = {key for row in run.batches for key in row} - {"batch", "time", MEAN_REWARD}
    shown = [_small(run, key, title, sentence) for title, key, sentence in PANELS if key in keys]
    others = sorted(keys - {key for _, key, _ in PANELS})
    rest = "".join(_small(run, key, key, "") for key in others)
    if not shown and not rest:
        return ""
    folded = f'<details><summary>All other curves</summary><div class="grid">{rest}</div></details>' if rest else ""
    return f'<section><h2>Training</h2><div class="grid">{"".join(shown)}</div>{folded}</section>'


def prompts(run: RunFolder) -> str:
    """The prompts that gained most and least."""
    rows = by_prompt(run.evaluations)
    if not rows:
        return ""
    chosen = rows if len(rows) <= 12 else [*rows[:6], *rows[-6:]]
    cells = [(p, number(before), number(after), signed(after - before)) for p, before, after in chosen]
    heading = "Prompts" if len(rows) <= 12 else "Prompts that gained most and least"
    return f"<section><h2>{heading}</h2>{table(('prompt', 'before', 'after', 'change'), cells)}</section>"


def where_time_went(run: RunFolder) -> str:
    """Which count to raise, and for each worker the shares of its time by occupation, waiting last and pale."""
    workers: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sitting in run.sittings:
        for worker, occupations in sitting["seconds"].items():
            for occupation, seconds in occupations.items():
                workers[worker][occupation] += seconds
    bars = "".join(_bar(worker, occupations) for worker, occupations in sorted(workers.items()))
    if not bars:
        return ""
    advice = run.sittings[-1].get("advice", "")
    advice = f"<p>In the last batches {html.escape(advice)}.</p>" if advice else ""
    sentence = "Hatched is waiting, and for what. A role that hardly waits holds the others up."
    return f"<section><h2>Where the time went</h2>{advice}<p>{sentence}</p>{bars}</section>"


def settings(run: RunFolder) -> str:
    """What differs from the defaults, and the whole configuration."""
    plain = Config(rewards={name: RewardConfig() for name in run.config.rewards})
    plain.run.name = run.config.experiment
    defaults, values = (flatten(portable(dataclasses.asdict(config))) for config in (plain, run.config))
    changed = [(k, shown(v), shown(defaults.get(k, ""))) for k, v in values.items() if v != defaults.get(k)]
    written = html.escape((run.path / "config.yaml").read_text(encoding="utf-8"))
    return (
        "<section><h2>Settings</h2><p>Those that differ from the defaults:</p>"
        f"{table(('setting', 'value', 'default'), changed)}"
        f"<details><summary>config.yaml</summary><pre>{written}</pre></details></section>"
    )


def machine(run: RunFolder) -> str:
    """Where it ran, from run.json; without one, where the report was written."""
    machines = {describe(sitting["machine"]): sitting["machine"] for sitting in run.sittings}
    note = "" if machines else "<p>The run did not write down its machine; this is where the report was written.</p>"
    for machine in machines.values() or [machine_info()]:
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        rows = [("CPU", machine["cpu"]), ("flags", " ".join(machine["flags"]) or "–"), ("cores", str(machine["cores"]))]
        rows += [("memory", f"{machine['memory_gib']:g} GiB"), ("GPUs", ", ".join(machine["gpus"]) or "none")]
        rows += [("system", machine["system"]), ("software", f"Python {machine['python']}, {versions}")]
        note += table((), rows)
    return f"<section><h2>Machine</h2>{note}</section>"


def usage(run: RunFolder, run_dir: Path) -> str:
    """How to draw one of the evaluation's pictures with the finetuned LoRA, in a plain diffusers program."""
    prompt, seed = "a prompt", 0
    if run.evaluations:
        rows = run.evaluations[max(run.evaluations)]
        prompt, seed = rows["prompt"][0].as_py(), rows["seed"][0].as_py()
    lora = str(run_dir / "lora")
    try:
        drawing = BUILT_IN[run.config.model.family or class_name(run.config.model)].drawing
    except (UserError, KeyError):  # the model is elsewhere, or of a family of the user's own
        return f"<section><h2>Use it</h2><p>The LoRA that the run left: {html.escape(lora)}</p></section>"
    code = drawing.format(model=run.config.model, sampling=run.config.sampling, lora=lora, prompt=prompt, seed=seed)
    sentence = "This draws one of the evaluation's pictures with the LoRA that the run left:"
    return f"<section><h2>Use it</h2><p>{sentence}</p><pre>{html.escape(code)}</pre></section>"


# ---- pieces


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of plain text; the first column is the row's name."""
    heading = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if head else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{heading}{body}</table></div>'


def signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def shown(value: Any) -> str:
    return "–" if value is None or value == "" else str(getattr(value, "value", value))


def _small(run: RunFolder, key: str, title: str, sentence: str) -> str:
    drawing = chart([Curve(title, *series(run.batches, key))], width=320, height=150)
    name = f"<code>{html.escape(key)}</code>" if key != title else ""
    return f'<div class="small"><h3>{html.escape(title)} {name}</h3>{drawing}<p>{sentence}</p></div>' if drawing else ""


def _bar(worker: str, occupations: dict[str, float]) -> str:
    total = sum(occupations.values())
    if not total:
        return ""
    ordered = sorted(occupations.items(), key=lambda item: (item[0].startswith("waiting"), -item[1]))
    pieces, legend = [], []
    for index, (occupation, seconds) in enumerate(ordered):
        style = "wait" if occupation.startswith("waiting") else f"c{index % 6}"
        label = f"{html.escape(occupation)} {seconds / total:.0%}"
        pieces.append(f'<i class="{style}" style="flex-grow:{seconds / total:.4f}" title="{label}"></i>')
        legend.append(f'<span class="{style}">{label}</span>')
    bar = f'<div class="bar">{"".join(pieces)}</div><p class="legend">{"".join(legend)}</p>'
    return f'<div class="worker"><h3>{html.escape(worker)} <small>{duration(total)}</small></h3>{bar}</div>'


def series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """(batches, values) of one key of the metrics, where it is there and finite."""
    found = [(row["batch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [batch for batch, _ in found], [value for _, value in found]
