"""What a person sees while a run goes on: a live panel in a terminal, a line a batch elsewhere."""

import math
import statistics
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

from buffer.orders import Evaluation
from conf.evaluations import FIRST
from monitoring.advice import Advice


@dataclass(frozen=True)
class Snapshot:
    """One moment of a run."""

    trained: int  # batches
    rows: list[dict[str, float]]  # of metrics.jsonl, one a batch, oldest first
    evaluations: dict[Evaluation, dict[str, float]]  # mean rewards by name; none where no picture has one
    waiting: dict[str, float]  # share of its time that each worker waited, 0 to 1
    orders: dict[str, int]  # how many orders of untrained batches are in each state
    evaluating: int  # orders of evaluations that are not over
    set_aside: int  # pictures
    restarts: int
    notes: list[str]  # what went wrong since this start and was mended, a sentence each
    mirror_behind: int | None = None  # trained batches that the mirror does not have yet; None without a mirror
    advice: Advice | None = None  # who holds the run up; None while too little is known
    earlier: int | None = None  # of `rows`, how many earlier starts wrote; None at a run's first start
    earlier_evaluations: frozenset[Evaluation] = frozenset()  # of `evaluations`, those that they wrote


@dataclass
class Display:
    """Use as a context manager; `show` whenever there is something new, `say` for a sentence that stays."""

    name: str
    batches: int
    console: Console = field(default_factory=lambda: Console(file=sys.stdout, highlight=False))
    live: Live | None = None
    said_what_is_first: bool = False
    goes_on: bool = False  # with what earlier starts did and printed
    printed: int = 0
    printed_evaluations: set[Evaluation] = field(default_factory=set)
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
        if now.earlier is not None and not self.goes_on:
            self.goes_on = True
            self.printed, self.printed_evaluations = now.earlier, set(now.earlier_evaluations)
            self.say(f"{self.name} goes on: {now.trained} of {self.batches} batches are trained")
        if self.live is not None:
            self.live.update(self._panel(now))
        else:
            self._lines(now)

    def _lines(self, now: Snapshot) -> None:
        if now.evaluating and not now.trained and not self.said_what_is_first:
            self.said_what_is_first = True
            self.say("the evaluation of version 0 comes first, then the batches")
        for evaluation in sorted(set(now.evaluations) - self.printed_evaluations):
            where = f"version {evaluation.version}{_set_in_words(evaluation)}"
            self.say(f"evaluation at {where}: {_means_in_words(now.evaluations[evaluation])}")
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
            f"batch {int(row['batch']) + 1}/{self.batches}  "
            f"reward {_shown(row, 'reward/mean', 'z.4f')} ± {_shown(row, 'reward/std', 'z.4f')}  "
            f"{_shown(row, 'images_per_s', 'z.1f')} images/s  age {_shown(row, 'age/max', 'z.0f')}  "
            f"ratio gap {_shown(row, 'ratio/gap', 'z.1e')}  clipped {_shown(row, 'clip_fraction', 'z.1%')}  "
            f"KL {_shown(row, 'kl/base', 'z.3g')}  "
            f"set aside {now.set_aside}  restarts {now.restarts}"
            + (f"  mirror {now.mirror_behind} behind" if now.mirror_behind is not None else "")
            + self._left(now, "  left {}")
        )

    def _left(self, now: Snapshot, sentence: str) -> str:
        """`sentence` with the time that the rest takes; "" as long as that is not known."""
        seconds = _seconds_left(now, self.batches)
        return "" if seconds is None else sentence.format(_duration(seconds))

    def _panel(self, now: Snapshot) -> Panel:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        facts.add_row("", ProgressBar(total=self.batches, completed=now.trained, width=60))
        facts.add_row("batches", f"{now.trained} of {self.batches} batches{self._left(now, ', {} left')}")
        if now.rows:
            row = now.rows[-1]
            curve = sparkline([past.get("reward/mean", math.nan) for past in now.rows])
            mean, spread = _shown(row, "reward/mean", "z.4f"), _shown(row, "reward/std", "z.4f")
            facts.add_row("reward", f"{mean} ± {spread}   {curve}")
            facts.add_row("images/s", _shown(row, "images_per_s", "z.1f"))
            age, oldest = _shown(row, "age/mean", "z.2f"), _shown(row, "age/max", "z.0f")
            facts.add_row("age", f"mean {age}, at most {oldest} versions")
            gap, clipped = _shown(row, "ratio/gap", "z.1e"), _shown(row, "clip_fraction", "z.1%")
            facts.add_row("ratio", f"gap before the update {gap}, clipped {clipped}")
            facts.add_row("KL to base", f"{_shown(row, 'kl/base', 'z.4g')} nats a trajectory")
        for evaluation, evaluated in sorted(now.evaluations.items())[-3:]:
            facts.add_row(f"evaluation at {evaluation.version}{_set_in_words(evaluation)}", _means_in_words(evaluated))
        orders = [f"{count} {state.replace('_', ' ')}" for state, count in sorted(now.orders.items())]
        orders += [f"{now.evaluating} of evaluations to come"] if now.evaluating else []
        facts.add_row("orders", ", ".join(orders) or "none")
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
    """The last `width` finite values as a row of blocks, the lowest ▁ and the highest █; "" if there is none."""
    values = [value for value in values if math.isfinite(value)][-width:]
    low, high = min(values, default=0.0), max(values, default=0.0)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[int((value - low) / (high - low or 1.0) * (len(blocks) - 1))] for value in values)


def _shown(row: dict[str, float], key: str, form: str) -> str:
    """A number that not every batch has: there is no gap without fresh data, no speed before the second batch."""
    value = row.get(key, math.nan)
    return format(value, form) if math.isfinite(value) else "–"


def _set_in_words(evaluation: Evaluation) -> str:
    return f" on {evaluation.set}" if evaluation.set != FIRST else ""


def _means_in_words(means: dict[str, float]) -> str:
    return ", ".join(f"{name} {mean:z.4f}" for name, mean in means.items()) or "no picture has a reward"


def _seconds_left(now: Snapshot, batches: int) -> float | None:
    """From the pace of the last ten batches; what lies between two starts is no batch."""
    times = [row["time"] for row in now.rows]
    first = now.earlier or 0  # row of this start
    steps = [times[i] - times[i - 1] for i in range(max(1, len(times) - 10), len(times)) if i != first]
    if not steps:
        return None
    since = time.time() - times[-1] if len(times) > first else 0.0
    return max(0.0, statistics.median(steps) * (batches - now.trained) - since)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
