"""Whose mirror it is: claims of epochs, on file systems that can only write, list and remove.

    epochs/000002-9f86d081884c      one file a claim: its epoch, and a random part that nobody else has

A claimant writes a file under a name of its own, *then* lists. If it sees no other claim of this epoch or a later one,
the epoch is its own; else it withdraws and tries a higher one after a random delay. No two ever own an epoch: each
would have listed before the other wrote, but each writes before it lists, so of the two the one that lists last sees
the other. This needs listings that show what was written before (S3, Google's store and local disks do), and nothing
else. Both may withdraw, and a claim whose owner died stays: then that epoch has no owner, and a higher one is taken.

A run folder remembers its claims in mirror.json, each *before* it is written to the mirror. So it knows its own, and a
claim of somebody else that is higher means that another head has gone on with the run.
"""

import json
import os
import random
import re
import socket
import time
from pathlib import Path

from common.errors import UserError
from common.files import write_atomically
from mirror.remote import Remote

CLAIM = re.compile(r"epochs/(\d{6}-[0-9a-f]{12})")
FIRST_DELAY_S, LONGEST_DELAY_S = 0.1, 5.0
MEMORY = "mirror.json"


class Epochs:
    """A head's side of it. held: the claim that this head won last; empty before the first."""

    def __init__(self, remote: Remote, uri: str, run_dir: Path) -> None:
        self.remote = remote
        self.uri = uri
        self.run_dir = run_dir
        known = _read(run_dir).get(uri, {})
        self.held: str = known.get("held", "")
        self.trying: str = known.get("trying", "")  # may have been won by a start that died before it could say so

    def names(self) -> list[str]:
        """All claims, by epoch."""
        return [found[1] for path in self.remote.files("epochs") if (found := CLAIM.fullmatch(path))]

    def later(self) -> str | None:
        """The highest claim of another head, if it is higher than ours."""
        others = [name for name in self.names() if name not in (self.held, self.trying)]
        return others[-1] if others and epoch_of(others[-1]) > epoch_of(self.held) else None

    def refuse_if_later(self) -> None:
        if later := self.later():
            raise UserError(
                f"another head has gone on with this run (epoch {epoch_of(later)} in the mirror {self.uri}), and what "
                f"{self.run_dir} has since then does not count: remove that folder to go on from the mirror, or give "
                "another run.name"
            )

    def take(self, over: bool, remember: bool = True) -> None:
        """Claim the next epoch. over: even if others have claims here; else that is a UserError.

        remember: in the run folder. (A head that has none yet does it by `save`, with the folder.)
        """
        delay = FIRST_DELAY_S
        while True:
            if not over:
                self.refuse_if_later()
            epoch = max(map(epoch_of, self.names()), default=0) + 1
            self.trying = f"{epoch:06d}-{os.urandom(6).hex()}"
            if remember:
                self.save(self.run_dir)
            self.remote.write(f"epochs/{self.trying}", _who().encode())
            if not [name for name in self.names() if name != self.trying and epoch_of(name) >= epoch]:
                self.held = self.trying
                if remember:
                    self.save(self.run_dir)
                return
            self.remote.remove([f"epochs/{self.trying}"])
            time.sleep(random.uniform(0.0, delay))
            delay = min(2 * delay, LONGEST_DELAY_S)

    def save(self, folder: Path) -> None:
        """Remember the claims in `folder`, which is the run folder or becomes it. Those of other mirrors stay."""
        known = _read(folder) | {self.uri: {"held": self.held, "trying": self.trying}}
        write_atomically(folder / MEMORY, json.dumps(known, indent=1))


def epoch_of(claim: str) -> int:
    return int(claim.split("-")[0]) if claim else 0


def _read(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / MEMORY
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {uri: {name: str(claims[name]) for name in ("held", "trying")} for uri, claims in known.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged, and says which epochs of the mirror are this folder's: put it back, or remove "
            f"{folder} to go on from the mirror"
        ) from error


def _who() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()})
