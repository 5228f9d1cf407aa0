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

from buffer.run_folder import RECORD, RunFolder
from common.files import write_atomically
from common.machine import machine_info

RECORD_S = 30.0  # from one writing to the next: what a driver that is killed leaves out


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
    record = RunFolder(run_dir).record
    record["sittings"][str(epoch)] = {
        "started": started,
        "ended": time.time(),
        "machine": machine_info(),
        "restarts": restarts,
        "seconds": seconds,
        "advice": advice,
    }
    write_atomically(run_dir / RECORD, json.dumps(record, indent=1))


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
    write_atomically(run_dir / RECORD, json.dumps(RunFolder(run_dir).record | {"finished": batches}, indent=1))
