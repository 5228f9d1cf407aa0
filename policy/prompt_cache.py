"""What the network is told of each prompt, kept in the host's memory up to a number of bytes."""

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from common.errors import UserError
from policy.family import Conditioning

LIMIT = 2 * 2**30  # bytes: some 8,000 prompts of Stable Diffusion 1.5


class PromptCache:
    """Who was asked for longest ago has to go first. What is not there is encoded, with the text encoders read anew for
    it: far slower, and the same numbers."""

    def __init__(self, encode: Callable[[Sequence[str]], Iterator[Conditioning]], limit: int = LIMIT) -> None:
        self.encode = encode
        self.limit = limit
        self.bytes = 0
        self._kept: dict[str, Conditioning] = {}  # the oldest first

    def fill(self, prompts: Sequence[str]) -> None:
        """Encodes as many of `prompts` as there is room for, in their order."""
        for prompt, conditioning in self._encoded(prompts):
            if self.bytes + _bytes(conditioning) > self.limit:
                return
            self._keep(prompt, conditioning)

    def __call__(self, prompts: Sequence[str]) -> list[Conditioning]:
        """On the CPU, one a prompt."""
        found = dict(self._encoded(prompts))
        for prompt in dict.fromkeys(prompts):
            if prompt in self._kept:
                found[prompt] = self._forget(prompt)
            self._keep(prompt, found[prompt])
        while self.bytes > self.limit and self._kept:
            self._forget(next(iter(self._kept)))
        return [found[prompt] for prompt in prompts]

    def _encoded(self, prompts: Sequence[str]) -> Iterator[tuple[str, Conditioning]]:
        """Of those that are not there. Raises UserError if there are not as many: the family may be a user's own."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        for prompt, conditioning in zip_longest(missing, self.encode(missing) if missing else ()):
            if prompt is None or conditioning is None:
                raise UserError(
                    "The model family's encode did not give one conditioning a prompt; let it give as many."
                )
            yield prompt, tuple(part.cpu() for part in conditioning)

    def _keep(self, prompt: str, conditioning: Conditioning) -> None:
        self._kept[prompt] = conditioning
        self.bytes += _bytes(conditioning)

    def _forget(self, prompt: str) -> Conditioning:
        conditioning = self._kept.pop(prompt)
        self.bytes -= _bytes(conditioning)
        return conditioning


def _bytes(conditioning: Conditioning) -> int:
    return sum(part.nbytes for part in conditioning)
