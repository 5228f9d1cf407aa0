"""The mirror of a run (`run.mirror`): enough of it on another disk that a new head can go on when the head's is lost.

    epochs/000002-9f86d081884c                          claims, see mirror_epochs.py
    000002-9f86d081884c/trajectories/b00003….parquet    copies that the owner of epoch 2 has made, by their names in the
    000002-9f86d081884c/checkpoints/v00004…/state.json  run folder, which are never used twice;
    000002-9f86d081884c/current/5c1f33a0…/metrics.jsonl     files that change, by their digests
    000002-9f86d081884c/head-000007.json                HEAD: the state, and the digest of every file that it needs

Order (rule 18 of docs/buffer.md): a batch's Parquet file, the recovery points, what people look at, then the HEAD that
names them. So a HEAD's files are there; what no HEAD names counts for nobody. A head writes only below its own claim,
and only once under a name, so that one behind a cut cable can spoil nothing of its successor's.

What a HEAD needs. In a restored state no order is bound to a version, so the versions that may still be asked for are
those of `Rules.served`: the last k + 1, and those with an open evaluation. Their recovery points are in the mirror;
tensors and scores of batches not yet trained are not, and are made again (rule 19).

Removing. After a HEAD the owner lists the claims, and only if it sees no higher one it removes what the HEAD does not
name. A later head claims *before* it reads HEADs: so either it is seen, or it reads this HEAD and needs no older files.

The mirror follows the journal on disk, as a start of the buffer does, and reads nothing else to learn the state. If
retention has removed a recovery point before it was copied, the run has gone on: the next HEAD is of a later version.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from buffer.journal import begin
from buffer.run_folder import RunFolder
from buffer.state import Record, State, restored_record
from common.errors import RunStopped, UserError
from common.files import digest_of, disk_stops_the_run, sealed, sync, unsealed
from conf.resume import UNFINISHED
from mirror.epochs import Epochs, epoch_of
from mirror.remote import ERRORS, Remote, first_line

# Besides what the state names: what a person expects in a run folder, and metrics that lead up to the HEAD.
SETTINGS = ("config.yaml", "prompts.txt")
# The note before the weights: one that is older than they are is mended, and the other way round it would not be.
LORAS = ("lora/*.safetensors", "loras/*/*.safetensors", "lora_best/version.json", "lora_best/*.safetensors")
CURRENT = (*SETTINGS, "metrics.jsonl", "run.json", "report.html", "samples/*.png", *LORAS)

Copy = tuple[str, str]  # (path in the mirror, sha256)


@dataclass(frozen=True)
class Head:
    """What a HEAD record says. epoch: the run folder's, so that the next one's names are new."""

    epoch: int
    plan: dict[str, Any]
    state: Record
    files: dict[str, Copy]  # path in the run folder -> its copy


class Overtaken(OSError):
    """A file of the run folder was removed before it was copied."""


class Mirror:
    """One head's side of the mirror. Calls come one at a time; they raise what `remote.ERRORS` names when the mirror
    cannot be reached, and may then be made again."""

    def __init__(self, remote: Remote, uri: str, run_dir: Path) -> None:
        self.remote = remote
        self.uri = uri
        self.run_dir = run_dir
        self.fresh = not (run_dir / "config.yaml").exists()
        self.epochs = Epochs(remote, uri, run_dir)
        self.copies = 0  # files copied by this head
        self._claimed = False  # in this start
        self._copied: dict[str, Copy] = {}
        self._there: set[str] = set()  # files in the mirror besides claims
        self._head: tuple[str, Head] | None = None  # the last that this start wrote
        self._heads = 0

    @classmethod
    def at(cls, uri: str, run_dir: Path) -> "Mirror":
        """The mirror of `run_dir` under a URI. Raises UserError if it cannot be used."""
        return cls(Remote.at(uri, run_dir), uri, run_dir)

    # ---- a new head

    def prepare(self, check: Callable[[Path], None]) -> bool:
        """Before a start does anything with the run folder. True: it was restored from the mirror just now.

        check: raises UserError if the run in a folder was begun with other settings; asked before anything is claimed.
        Raises UserError if another head has gone on with this run folder's run, or if the mirror is damaged.
        """
        try:
            if not self.fresh:
                self.epochs.refuse_if_later()
                return False
            head = self._newest_head()
            if head is None:
                return False
            folder = self.run_dir.with_name(f".{self.run_dir.name}.restoring")
            shutil.rmtree(folder, ignore_errors=True)
            try:
                self._fetch(head, SETTINGS, folder)
                check(folder)
                self.epochs.take(over=True, remember=False)
                self._claimed = True
                head = self._newest_head()  # what was there before the claim may have been removed since
                assert head is not None
                self._restore(head, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        except ERRORS as error:
            raise UserError(
                f"run.mirror={self.uri} cannot be read ({first_line(error)}): mend it and give the same command again"
            ) from error
        return True

    def _restore(self, head: Head, folder: Path) -> None:
        """Fill `folder` from the HEAD, and make it the run folder."""
        self._fetch(head, head.files, folder)
        opened: Record = {"kind": "opened", "epoch": head.epoch + 1, "seals": {}, "plan": head.plan}
        with disk_stops_the_run(folder):
            begin(folder / "journal", head.epoch + 1, (opened | {"time": time.time()}, head.state))
            self.epochs.save(folder)
            for name in UNFINISHED:
                (self.run_dir / name).unlink(missing_ok=True)
            folder.rename(self.run_dir)
            sync(self.run_dir.parent)

    def _fetch(self, head: Head, paths: Any, folder: Path) -> None:
        for path in paths:
            at, digest = head.files[path]
            with disk_stops_the_run(folder):
                found = self.remote.get(at, folder / path)
            if found != digest:
                raise UserError(
                    f"the mirror's file {self.uri}/{self.run_dir.name}/{at} is not as it was written: put back a copy "
                    "of it, or start a new run under another run.name"
                )

    def _newest_head(self) -> Head | None:
        """The last whole HEAD of the highest epoch that has one."""
        while True:
            try:
                for claim in reversed(self.epochs.names()):
                    for path in reversed(self.remote.files(claim, recursive=False)):
                        if (head := _decode(self.remote.read(path))) is not None:
                            return head
                return None
            except FileNotFoundError:  # its owner has written another and removed this one
                continue

    # ---- following the run

    def claim(self) -> None:
        """Take the next epoch, unless this start has one. Raises UserError if another head has gone on with the run."""
        if self._claimed:
            return
        try:
            self.epochs.take(over=self.fresh)
        except ERRORS as error:
            raise UserError(f"run.mirror={self.uri} cannot be claimed ({first_line(error)}): mend it") from error
        self._claimed = True

    def sync(self, served: Callable[[State], set[int]]) -> int:
        """Bring the mirror to what is journaled now. Returns how many trained batches its HEAD has.

        served: versions whose recovery points a restored state needs. Raises RunStopped if another head has gone on
        with the run.
        """
        assert self._claimed
        if self._head is None:
            self._look_around()
        while True:
            run = RunFolder(self.run_dir)
            state = run.state
            if not state.trained:
                return 0
            try:
                head = self._copy(state, run.plan, served(state))
            except Overtaken:
                if RunFolder(self.run_dir).state.next_batch == state.next_batch:
                    raise
                continue
            if self._head is None or head != self._head[1]:
                self._write(head)
            self._tidy()
            return state.next_batch

    def _look_around(self) -> None:
        """What the mirror has; of that, copies of what is in this run folder need not be made again."""
        claims = set(self.epochs.names())
        self._there = {path for path in self.remote.files() if path.split("/")[0] in claims}
        head = self._newest_head()
        for path, (at, digest) in head.files.items() if head else ():
            local = self.run_dir / path
            if at in self._there and local.exists() and digest_of(local) == digest:
                self._copied[path] = (at, digest)

    def _copy(self, state: State, plan: dict[str, Any], served: set[int]) -> Head:
        needed = [trained.parquet for trained in state.trained if trained.parquet]
        for version in sorted(served):
            needed += self._files_of(state.trained[version].recovery_point)
        needed += [parquet for parquet in state.evaluations.values() if parquet]
        for path in needed:
            if path not in self._copied:
                self._copy_one(path)
        for pattern in CURRENT:
            for local in sorted(self.run_dir.glob(pattern)):
                path = str(local.relative_to(self.run_dir))
                self._copy_current(path, local.read_bytes())
                needed.append(path)
        return Head(state.epoch, plan, restored_record(state), {path: self._copied[path] for path in needed})

    def _files_of(self, recovery_point: str) -> list[str]:
        folder = self.run_dir / recovery_point
        if folder.is_dir():
            files = sorted(path.name for path in folder.iterdir())
            if folder.is_dir():  # it is renamed before its files are removed: so the list is complete
                return [f"{recovery_point}/{name}" for name in files]
        raise Overtaken(f"{folder} is gone")

    def _copy_one(self, path: str) -> None:
        """A file that never changes."""
        local, at = self.run_dir / path, f"{self.epochs.held}/{path}"
        self._there.add(at)
        if not local.exists():
            raise Overtaken(f"{local} is gone")
        try:
            self._copied[path] = (at, self.remote.put(at, local))
        except FileNotFoundError as error:
            if local.exists():
                raise
            raise Overtaken(f"{local} is gone") from error
        self.copies += 1

    def _copy_current(self, path: str, data: bytes) -> None:
        digest = hashlib.sha256(data).hexdigest()
        if self._copied.get(path, ("", ""))[1] != digest:
            at = f"{self.epochs.held}/current/{digest[:16]}/{path}"
            self._there.add(at)
            self.remote.write(at, data)
            self._copied[path] = (at, digest)
            self.copies += 1

    def _write(self, head: Head) -> None:
        self._stop_if_another_has_gone_on()
        self._heads += 1
        path = f"{self.epochs.held}/head-{self._heads:06d}.json"
        self._there.add(path)
        self.remote.write(path, sealed(asdict(head)))
        self._head = (path, head)
        self._copied = dict(head.files)

    def _tidy(self) -> None:
        assert self._head is not None
        path, head = self._head
        unneeded = self._there - {path} - {at for at, _ in head.files.values()}
        if unneeded:
            self._stop_if_another_has_gone_on()
            self.remote.remove(sorted(unneeded))
            self._there -= unneeded

    def _stop_if_another_has_gone_on(self) -> None:
        if later := self.epochs.later():
            raise RunStopped(
                f"Another head has gone on with this run (epoch {epoch_of(later)} in the mirror {self.uri}); this one "
                "stops, and nothing that it does from here on counts."
            )


def _decode(data: bytes) -> Head | None:
    """None if it was not written to its end."""
    if (fields := unsealed(data)) is None:
        return None
    fields["files"] = {path: (at, digest) for path, (at, digest) in fields["files"].items()}
    return Head(**fields)
