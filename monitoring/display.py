"""What a person sees while a run goes on: a live panel in a terminal, a line a batch elsewhere."""

import sys
import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitoring.advice import Advice


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run."""

    trained: int  # batches
    rows: list[dict[str, float]]  # of metrics.jsonl, one a batch, oldest first
    evaluations: dict[int, float]  # mean reward of the evaluation set by version
    waiting: dict[str, float]  # share of its time that each worker waited, 0 to 1
    orders: dict[str, int]  # how many orders of untrained batches are in each state
    set_aside: int  # pictures
    restarts: int
    notes: list[str]  # what went wrong since this start and was mended, a sentence each
    mirror_behind: int | None = None  # trained batches that the mirror does not have yet; None without a mirror
    advice: Advice | None = None  # who holds the run up; None while too little is known


@dataclass
class Display:
    """Use as a context manager; `show` whenever there is something new, `say` for a sentence that stays."""

    name: str
    batches: int
    console: Console = field(default_factory=lambda: Console(file=sys.stdout, highlight=False))
    live: Live | None = None
    printed: int = 0
    printed_evaluations: set[int] = field(default_factory=set)
    printed_notes: set[str] = field(default_factory=set)
    advised: dict[str, tuple[int, int]] = field(default_factory=dict)  # what was last said to be raised

    def __enter__(self) -> "Display":
        if self.console.is_terminal:
            self.live = Live(Text("starting …"), console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, sentence: str) -> None:
        self.console.print(sentence, soft_wrap=True, markup=False)

    def show(self, now: Snapshot) -> None:
        if self.live is not None:
            self.live.update(self._panel(now))
        else:
            self._lines(now)

    def _lines(self, now: Snapshot) -> None:
        for version in sorted(set(now.evaluations) - self.printed_evaluations):
            self.say(f"evaluation at version {version}: reward {now.evaluations[version]:.4f}")
        self.printed_evaluations = set(now.evaluations)
        for row in now.rows[self.printed :]:
            self.say(self._line(row, now))
        self.printed = len(now.rows)
        for note in now.notes:
            if note not in self.printed_notes:
                self.say(note)
        self.printed_notes |= set(now.notes)
        if now.advice and now.advice.raises != self.advised:
            self.say(now.advice.sentence)
            self.advised = now.advice.raises

    def _line(self, row: dict[str, float], now: Snapshot) -> str:
        return (
            f"batch {int(row['batch']) + 1}/{self.batches}  reward {row['reward/mean']:.4f} ± {row['reward/std']:.4f}  "
            f"{_shown(row, 'images_per_s', '.1f')} images/s  age {row['age/max']:.0f}  "
            f"ratio gap {_shown(row, 'ratio/gap', '.1e')}  clipped {_shown(row, 'clip_fraction', '.1%')}  "
            f"KL {_shown(row, 'kl/base', '.3g')}  "
            f"set aside {now.set_aside}  restarts {now.restarts}  "
            + (f"mirror {now.mirror_behind} behind  " if now.mirror_behind is not None else "")
            + f"left {_duration(_seconds_left(now, self.batches))}"
        )

    def _panel(self, now: Snapshot) -> Panel:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        facts.add_row("", ProgressBar(total=self.batches, completed=now.trained, width=60))
        facts.add_row("batches", f"{now.trained} of {self.batches}, {_duration(_seconds_left(now, self.batches))} left")
        if now.rows:
            row = now.rows[-1]
            rewards = [past["reward/mean"] for past in now.rows]
            facts.add_row("reward", f"{rewards[-1]:.4f} ± {row['reward/std']:.4f}   {sparkline(rewards)}")
            facts.add_row("images/s", _shown(row, "images_per_s", ".1f"))
            facts.add_row("age", f"mean {row['age/mean']:.2f}, at most {row['age/max']:.0f} versions")
            gap, clipped = _shown(row, "ratio/gap", ".1e"), _shown(row, "clip_fraction", ".1%")
            facts.add_row("ratio", f"gap before the update {gap}, clipped {clipped}")
            facts.add_row("KL to base", f"{_shown(row, 'kl/base', '.4g')} nats a trajectory")
        for version, mean in sorted(now.evaluations.items())[-3:]:
            facts.add_row(f"evaluation at {version}", f"{mean:.4f}")
        facts.add_row("orders", ", ".join(f"{count} {state}" for state, count in sorted(now.orders.items())) or "none")
        facts.add_row("waiting", ", ".join(f"{who} {share:.0%}" for who, share in sorted(now.waiting.items())))
        if now.advice:
            facts.add_row("for whom", ", ".join(f"{who}: {whom}" for who, whom in sorted(now.advice.waits_for.items())))
            facts.add_row("bottleneck", now.advice.sentence.removeprefix("the bottleneck is "))
        if now.mirror_behind is not None:
            facts.add_row("mirror", f"{now.mirror_behind} batches behind" if now.mirror_behind else "up to date")
        facts.add_row("trouble", f"{now.set_aside} pictures set aside, {now.restarts} restarts")
        bar = ProgressBar(total=self.batches, completed=now.trained)
        return Panel(
            Group(bar, facts, Text("\n".join(now.notes[-3:]), style="yellow")),
            title=f"ddpo-ray · {self.name}",
            expand=False,
        )


def sparkline(values: list[float], width: int = 32) -> str:
    """The last `width` values as a row of blocks, the lowest ▁ and the highest █."""
    values = values[-width:]
    low, high = min(values), max(values)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[int((value - low) / (high - low or 1.0) * (len(blocks) - 1))] for value in values)


def _shown(row: dict[str, float], key: str, form: str) -> str:
    """A number that not every batch has: there is no gap without fresh data, no speed before the second batch."""
    return format(row[key], form) if key in row else "–"


def _seconds_left(now: Snapshot, batches: int) -> float | None:
    """From the pace of the last ten batches."""
    recent = now.rows[-11:]
    if len(recent) < 2:
        return None
    pace = (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1)
    return max(0.0, pace * (batches - now.trained) - (time.time() - recent[-1]["time"]))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
