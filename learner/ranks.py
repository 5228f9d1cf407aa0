"""The learner's ranks: N processes with the same weights, each with its part of every optimizer step's pairs.

    every rank:   gradient over its part  ──►  sum over ranks  ──►  the same step of AdamW on the same numbers

The gradient of an optimizer step is a mean over its pairs, and a mean is a sum of parts; so N ranks do what one does,
up to the order of summation. Only numbers cross between ranks (torch.distributed: NCCL on GPUs, gloo on CPUs), never
pickled objects. A rank that fails raises in all others, for what they wait for does not come.
"""

import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Iterable
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(minutes=10)  # of one rank for another, which may be writing a recovery point
GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux: the IPv4 address of a network interface


class RanksDisagree(Exception):
    """The ranks do not hold the same; training on would give each its own weights."""


class Ranks:
    """One rank's view of all. `Ranks()` is a learner of one rank, for which nothing is sent."""

    def __init__(self, rank: int = 0, count: int = 1, device: str = "cpu") -> None:
        """For count above 1, `join` makes it."""
        self.rank = rank
        self.count = count
        self.device = device

    @classmethod
    def join(cls, rank: int, count: int, meeting: "Meeting", device: str) -> "Ranks":
        """Waits until all ranks are there. device: where this rank's weights are, "cpu" or "cuda"."""
        use_interface_of(meeting.own_address)
        listening = meeting.socket.detach() if meeting.socket else None
        store = dist.TCPStore(
            meeting.address, meeting.port, count, rank == 0, timeout=PATIENCE, master_listen_fd=listening
        )
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
        return cls(rank, count, device)

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks for the group."""
        return self.rank == 0

    def part(self, length: int) -> slice:
        """This rank's part of a list that all ranks have; the parts in the order of ranks are the whole."""
        edges = np.linspace(0, length, self.count + 1).astype(int)
        return slice(int(edges[self.rank]), int(edges[self.rank + 1]))

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over ranks, in place; the result has the same bits on every rank."""
        tensors = list(tensors)
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(self.device)  # one message, not hundreds
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, values: Tensor) -> Tensor:
        """[..., n_0 + n_1 + ...] on the CPU: every rank's `values` [..., n_rank], one after another."""
        if self.count == 1:
            return values.cpu()
        size = torch.tensor([values.shape[-1]], device=self.device)
        sizes = [torch.zeros_like(size) for _ in range(self.count)]
        dist.all_gather(sizes, size)
        longest = max(int(each) for each in sizes)
        padded = torch.zeros((*values.shape[:-1], longest), dtype=values.dtype, device=self.device)
        padded[..., : values.shape[-1]] = values
        all_padded = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(all_padded, padded)
        return torch.cat([part[..., : int(n)] for part, n in zip(all_padded, sizes, strict=True)], dim=-1).cpu()

    def any(self, value: bool) -> bool:
        """Whether it is true on any rank; all ranks wait here for one another."""
        total = torch.tensor([float(value)])
        self.sum([total])
        return bool(total.item())

    def highest(self, value: int) -> int:
        """Of all ranks; all ranks wait here for one another."""
        return int(self.gather(torch.tensor([float(value)], dtype=torch.float64)).max())

    def agree(self, what: str, text: str) -> None:
        """Raises RanksDisagree on every rank unless `text` is the same on all."""
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")  # exact in float64
        digests = self.gather(torch.tensor([float(digest)], dtype=torch.float64))
        if len(set(digests.tolist())) > 1:
            raise RanksDisagree(f"the learner's {self.count} ranks hold different {what}; this one holds {text}")


class Meeting:
    """Where the ranks meet: rank 0 listens on its own address, and on no other, at a port that is free."""

    def __init__(self, own_address: str, at: tuple[str, int] | None = None) -> None:
        """own_address: an IPv4 address of this rank's host that the other ranks reach. at: rank 0's address and port,
        for the other ranks."""
        self.own_address = own_address
        self.socket: socket.socket | None = None
        if at is None:
            self.socket = socket.create_server((own_address, 0))
            at = (own_address, int(self.socket.getsockname()[1]))
        self.address, self.port = at


def use_interface_of(address: str) -> None:
    """Has gloo and NCCL listen on the interface with this address: by themselves they would take the host's name, which
    on many hosts is another's, or none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, GET_ADDRESS, struct.pack("256s", name.encode()))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = name
