"""The prompt cache: bounded in bytes, the oldest goes first, and what is there is never encoded again."""

from collections.abc import Iterator, Sequence

import pytest
import torch

from common.errors import UserError
from policy.family import Conditioning
from policy.prompt_cache import PromptCache

EACH = 40  # bytes of a prompt's conditioning below: [4] float32 and [3] float64


class Encoder:
    """Gives each prompt tensors of its own, and notes which were asked for, and how far."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.encoded: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> Iterator[Conditioning]:
        self.asked.append(list(prompts))
        for prompt in prompts:
            self.encoded.append(prompt)
            yield conditioning(prompt)


def conditioning(prompt: str) -> Conditioning:
    return torch.full((4,), float(ord(prompt))), torch.full((3,), -float(ord(prompt)), dtype=torch.float64)


def assert_answers(cache: PromptCache, prompts: str) -> None:
    for prompt, parts in zip(prompts, cache(list(prompts)), strict=True):
        assert all(torch.equal(part, expected) for part, expected in zip(parts, conditioning(prompt), strict=True))


def cache_of(encoder: Encoder, prompts: int) -> PromptCache:
    """With room for so many prompts, and not quite for one more."""
    return PromptCache(encoder, limit=prompts * EACH + EACH - 1)


def test_answers_come_in_the_order_of_the_question_and_each_prompt_is_encoded_once() -> None:
    encoder = Encoder()
    cache = cache_of(encoder, 9)
    assert_answers(cache, "caba")
    assert_answers(cache, "bdcb")
    assert_answers(cache, "abcd")
    assert encoder.asked == [["c", "a", "b"], ["d"]]
    assert cache([]) == [] and len(encoder.asked) == 2


def test_who_was_asked_for_longest_ago_goes_first() -> None:
    encoder = Encoder()
    cache = cache_of(encoder, 3)
    for prompts in ("abc", "a", "d"):  # a is younger than b, which makes room for d
        assert_answers(cache, prompts)
    assert cache.bytes == 3 * EACH
    encoder.encoded.clear()
    assert_answers(cache, "cad")
    assert encoder.encoded == []
    assert_answers(cache, "b")  # and takes the place of c, which came first in the last question
    assert_answers(cache, "adb")
    assert encoder.encoded == ["b"]
    assert_answers(cache, "c")
    assert encoder.encoded == ["b", "c"]


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_question_that_is_larger_than_the_room_is_answered_whole(room: int) -> None:
    encoder = Encoder()
    cache = cache_of(encoder, room)
    for _ in range(2):
        assert_answers(cache, "abcab")
        assert cache.bytes == room * EACH
    encoder.encoded.clear()
    assert_answers(cache, "cba"[: max(room, 1)])  # the last of the question are there
    assert encoder.encoded == (["c"] if room == 0 else [])


def test_filling_stops_where_the_room_ends_and_keeps_what_is_there() -> None:
    encoder = Encoder()
    cache = cache_of(encoder, 3)
    cache.fill(list("ababcdef"))
    assert encoder.asked == [list("abcdef")] and encoder.encoded == list("abcd")  # d is where it is noticed
    assert cache.bytes == 3 * EACH
    assert_answers(cache, "abc")
    assert encoder.encoded == list("abcd")


def test_filling_encodes_only_what_is_missing_and_asks_for_nothing_where_all_is_there() -> None:
    encoder = Encoder()
    cache = cache_of(encoder, 9)
    assert_answers(cache, "b")
    cache.fill(["a", "b", "c"])
    cache.fill(["c", "a", "b"])
    cache.fill([])
    assert encoder.asked == [["b"], ["a", "c"]]
    assert cache.bytes == 3 * EACH


def test_an_encoder_that_fails_leaves_what_was_there() -> None:
    encoder = Encoder()
    cache = PromptCache(lambda prompts: encoder(prompts) if "x" not in prompts else iter([conditioning("a")]), 9 * EACH)
    assert_answers(cache, "ab")
    with pytest.raises(UserError, match="one conditioning a prompt"):  # two prompts, one answer
        cache(["a", "x", "y"])
    assert_answers(cache, "ab")
    assert encoder.encoded == ["a", "b"] and cache.bytes == 2 * EACH


def test_an_encoder_that_gives_too_many_is_told_so() -> None:
    cache = PromptCache(lambda prompts: iter([conditioning("a")] * 3))
    with pytest.raises(UserError, match="one conditioning a prompt"):
        cache(["a", "b"])
