"""What is gained against what is lost: a LoRA drawn at scales from 0 to 1, and the knee of that curve."""

from collections.abc import Mapping, Sequence

import numpy as np

from evaluation.summary import standard_error


def knee(gained: Sequence[float], kept: Sequence[float]) -> int:
    """The place of the point where what is gained and what is kept are largest together.

    gained, kept: of the same points, for each the higher the better; both are taken as shares of their range. Where one
    rises as the other falls, that is the point that lies farthest beyond the straight line between the ends (Satopaa et
    al. 2011, "Finding a kneedle in a haystack"). The largest gain where nothing is lost, the first place where nothing
    is gained.
    """
    x, y = (_shares(np.asarray(values, np.float64)) for values in (gained, kept))
    return int(np.argmax(x + y))


def _shares(values: np.ndarray) -> np.ndarray:
    spread = values.max() - values.min()
    shares: np.ndarray = (values - values.min()) / spread if spread > 0 else np.ones(len(values))
    return shares


def table(names: Sequence[str], rows: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """Markdown: a row for each point, with the mean and standard error of each measure. names: of the measures."""
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cell(found.get(m)) for m in names)} |" for name, found in rows.items()]
    return "\n".join(lines)


def _cell(values: np.ndarray | None) -> str:
    if values is None:
        return ""
    mean = f"{values.mean():.4f}"
    return f"{mean} ± {standard_error(values):.4f}" if len(values) > 1 else mean
