"""What the memory of a Ray actor does by itself: one whose method does nothing, called again and again.

    python -m benchmarks.bare_actor

The buffer actor's own memory creeps up in its first hours; this shows how much of that any actor does. With
MALLOC_ARENA_MAX=2 in the environment it soon stands still: what creeps is malloc, which gives Ray's threads arenas of
their own and fills them one after another.
"""

import os
import tempfile
from typing import Any

import ray

from actors.cluster import cluster
from benchmarks.measure import machine_line, own_memory
from common.terminal import print_anywhere
from conf.schema import Config, RayConfig

CALLS = 60_000
STEP = 5_000


class Bare:
    async def nothing(self, worker: str, seconds: dict[str, float]) -> None:
        """The arguments are those of a call of the buffer."""

    async def process(self) -> int:
        return os.getpid()


def main() -> None:
    print(machine_line())
    with (
        tempfile.TemporaryDirectory(prefix="ddpo-") as folder,
        cluster(Config(ray=RayConfig(dashboard=False, temp_dir=f"{folder}/ray"))),
    ):
        start: Any = ray.remote(num_cpus=0)
        actor = start(Bare).remote()
        pid = ray.get(actor.process.remote())
        for done in range(0, CALLS + 1, STEP):
            print(f"{done:6d} calls: {own_memory(pid):6.1f} MiB", flush=True)
            for _ in range(STEP // 100):
                ray.get([actor.nothing.remote("sampler-0", {}) for _ in range(100)])


if __name__ == "__main__":
    print_anywhere()
    main()
