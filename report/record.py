"""run.json: what only the driver knows of a run, one entry a sitting (from a start of the driver to its end), which is
written now and then: a sitting that was killed is there as well.

{"finished": 120,  # batches of which LoRA and report are written; absent before the first end
 "sittings": {"1": {"started": unix seconds, "ended": unix seconds, "machine": {...}, "restarts": 0,
                    "seconds": {"sampler-0": {"rolling out": 81.2, "waiting for orders: the learner": 3.1}, ...},
                    "advice": "the bottleneck is the learner: raise ..."}, ...}}
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.machine import machine_info
from conf.resume import write_atomically

NAME = "run.json"
MEND = "put it back, or remove it, as all that it says is what took how long"


def record_sitting(
    run_dir: Path,
    epoch: int,
    started: float,
    seconds: dict[str, dict[str, float]],
    restarts: int = 0,
    advice: str = "",
) -> None:
    """Writes or replaces the entry of the sitting that began with this epoch, atomically: call it as often as wanted.

    seconds: of each place, by occupation; those it waited begin with "waiting". started: unix seconds. advice: which
    count to raise, a sentence.
    """
    record = read_record(run_dir)
    record["sittings"][str(epoch)] = {
        "started": started,
        "ended": time.time(),
        "machine": machine_info(),
        "restarts": restarts,
        "seconds": seconds,
        "advice": advice,
    }
    write_atomically(run_dir / NAME, json.dumps(record, indent=1))


def by_place(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Sums over all who had a place one after another: "sampler-0.0" and "sampler-0.1" are both of "sampler-0"."""
    places: dict[str, dict[str, float]] = {}
    for worker, occupations in seconds.items():
        place = places.setdefault(worker.rpartition(".")[0], {})
        for occupation, spent in occupations.items():
            place[occupation] = place.get(occupation, 0.0) + spent
    return places


def record_end(run_dir: Path, batches: int) -> None:
    """Writes that the run has reached its end, with all that it leaves."""
    write_atomically(run_dir / NAME, json.dumps(read_record(run_dir) | {"finished": batches}, indent=1))


def read_record(run_dir: Path) -> dict[str, Any]:
    """What run.json holds; no sittings where there is none. Raises UserError for a damaged one."""
    path = run_dir / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sittings": {}}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {MEND}") from error
    if not isinstance(record, dict) or not isinstance(record.get("sittings"), dict):
        raise UserError(f"{path} is no record of a run: {MEND}")
    if not all(map(_is_sitting, record["sittings"].values())):
        raise UserError(f"{path} has a start without what is written of one: {MEND}")
    return record


def _is_sitting(entry: Any) -> bool:
    if not isinstance(entry, dict) or not {"started", "ended", "machine", "seconds"} <= entry.keys():
        return False
    times = (entry["started"], entry["ended"], entry.get("restarts", 0))
    places = entry["seconds"].values() if isinstance(entry["seconds"], dict) else [None]
    return (
        all(isinstance(time, int | float) for time in times)
        and isinstance(entry["machine"], dict)
        and all(isinstance(place, dict) and all(isinstance(s, int | float) for s in place.values()) for place in places)
    )
