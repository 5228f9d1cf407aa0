"""The publisher: what follows once a version is trained or an evaluation is over, for people and for samplers.

a batch journaled as trained     its row of metrics, then its weights where samplers find them
a version to be evaluated        its LoRA in loras/, to be kept
a finished evaluation            its row, its grid of pictures, the guard's verdict, the best version's LoRA
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor

from buffer.orders import Evaluation, Version
from buffer.protocol import News
from buffer.run_folder import grid_path, lora_path
from common.errors import UserError
from common.files import write_atomically
from conf.evaluations import sets_of
from conf.schema import Config
from evaluation import guard
from evaluation.history import verdict
from evaluation.measures import measures
from learner import recovery
from monitoring.metrics import MetricsLog
from policy import lora
from policy.source import WEIGHT_NAME, family_of
from report.grids import cells, save_grid


class PublishingBuffer(Protocol):
    """What the publisher asks of the buffer; see `TrajectoryBuffer`."""

    def current(self) -> tuple[Version, str] | None: ...
    def publish(self, version: Version, weights: Any) -> None: ...
    def evaluation(self, evaluation: Evaluation, pictures: int) -> tuple[pa.Table, dict[int, np.ndarray] | None]: ...
    def evaluation_missed(self, version: int, why: str) -> None: ...


class Publisher:
    """Call `step` with the news, again and again; `close` at the end."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        buffer: PublishingBuffer,
        share: Callable[[Mapping[str, Tensor]], Any],
        trained: int,
    ) -> None:
        """share: puts a LoRA where samplers find it, and gives what they find it by. trained: batches so far."""
        self.config = config
        self.run_dir = run_dir
        self.buffer = buffer
        self.share = share
        self.log = MetricsLog(run_dir, trained)
        self.shared: dict[Version, Any] = {}  # of the versions that somebody may still ask for
        self.evaluated = {v for one in sets_of(config).values() for v in one.versions(config.run.batches)}
        self.verdict = verdict(self.log.rows, self.config)
        self.gone: list[str] = []
        self.kept = ""  # what lora_best/version.json is known to say

    def step(self, news: News, more: Callable[[int], Mapping[str, float]] = lambda trained: {}) -> None:
        """more: further numbers for the row of the last of so many trained batches. Raises UserError if the recovery
        point of a version that samplers need is damaged."""
        for version, recovery_point in news.to_publish:
            self._publish(version, recovery_point, news, more)
        self.shared = {version: shared for version, shared in self.shared.items() if version in news.served}
        for evaluated in news.evaluations:
            if evaluated not in self.log.evaluated:
                self._record_evaluation(evaluated)
        if self.log.evaluated:
            self._keep_best()

    @property
    def notes(self) -> list[str]:
        """What the guard has to say, in sentences."""
        return [*self.verdict.sentences, *self.gone]

    @property
    def lr_halvings(self) -> int:
        """How often the guard has halved the learning rate."""
        return guard.halvings(self.verdict, self.config.guard)

    @property
    def stops(self) -> str:
        """Why the guard ends the run; "" as long as it goes on."""
        return guard.stops(self.verdict, self.config.guard)

    def save_lora(self) -> None:
        """Writes the newest LoRA, if there is one yet, to `lora/`."""
        if (newest := self.buffer.current()) is not None:
            version, recovery_point = newest
            self._export(recovery.read_lora(self.run_dir / recovery_point, version), self.run_dir / "lora")

    def close(self) -> None:
        self.log.close()

    def _export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        """With its scale in its weights: for any program."""
        temporary = folder / "writing.tmp"
        with recovery.operating_system_errors():
            lora.export(weights, temporary, self.config.model.lora, family_of(self.config.model))
        write_atomically(folder / WEIGHT_NAME, (temporary / WEIGHT_NAME).read_bytes())
        shutil.rmtree(temporary)

    def _publish(
        self, version: Version, recovery_point: str, news: News, more: Callable[[int], Mapping[str, float]]
    ) -> None:
        """The row first: who dies in between finds the version unpublished and does both again. Where a damaged
        recovery point is needed by an evaluation alone, that one is missed."""
        folder = self.run_dir / recovery_point
        try:
            if version not in self.shared:
                weights = recovery.read_lora(folder, version)
                if version.number in self.evaluated:
                    self._export(weights, self.run_dir / lora_path(version.number))
                self.shared[version] = self.share(weights)
            if version.number > 0 and version.number - 1 not in self.log.batches:
                row = recovery.read_metrics(folder, version)
                self.log.add_batch(version.number - 1, {**row, **more(version.number)})
        except UserError as error:
            if version.number >= news.trained - self.config.buffer.max_staleness:
                raise
            self.buffer.evaluation_missed(version.number, str(error))
            return
        self.buffer.publish(version, self.shared[version])

    def _record_evaluation(self, evaluation: Evaluation) -> None:
        grid = self.config.evaluation.grid
        rewards = sets_of(self.config)[evaluation.set].rewards
        rows, pictures = self.buffer.evaluation(evaluation, grid)
        drawn = cells(rows.slice(0, grid), pictures or {}, rewards)
        if drawn is not None:
            save_grid(self.run_dir / grid_path(evaluation), *drawn)
        row = {"pictures": float(rows["set_aside"].null_count)}
        for name, values in measures(rows).items():
            row |= {f"{name}/mean": float(values.mean()), f"{name}/std": float(values.std())}
        self.log.add_evaluation(evaluation, row)
        self.verdict = verdict(self.log.rows, self.config)

    def _keep_best(self) -> None:
        """Copies the best version's LoRA to `lora_best/`, and says there which version that is; once for each."""
        folder, best = self.run_dir / "lora_best", self.run_dir / lora_path(self.verdict.best) / WEIGHT_NAME
        says = json.dumps({"version": self.verdict.best, "by": guard.best_by(self.config)}) + "\n"
        note = folder / "version.json"
        if says == self.kept or (note.exists() and note.read_text(encoding="utf-8") == says):
            self.kept, self.gone = says, []
            return
        if not best.exists():
            gone = f"{best} is gone, so lora_best/ is not of version {self.verdict.best}, which is the best"
            self.gone = [gone]
            return
        folder.mkdir(exist_ok=True)
        note.unlink(missing_ok=True)  # so that it never stands beside another version's weights
        write_atomically(folder / WEIGHT_NAME, best.read_bytes())
        write_atomically(note, says)
        self.kept, self.gone = says, []
