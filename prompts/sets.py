"""The named prompt sets: the paper's (Black et al. 2023, sections 5 and 6), and those of Emoji World."""

import itertools
from collections.abc import Callable
from pathlib import Path

from prompts.scenes import (
    ACTIVITIES,
    ANIMALS,
    OBJECTS,
    SETTINGS,
    Scene,
    caption,
    make_manifest,
    plural,
    prompt_set,
    with_article,
)

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight")
IMAGENET_ANIMALS = Path(__file__).resolve().parent / "imagenet_animals.txt"

PAPER_SETS: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "imagenet_animals": (
        "the 398 animal classes of ImageNet",
        lambda: IMAGENET_ANIMALS.read_text(encoding="utf-8").splitlines(),
    ),
    "common_animals": ("the paper's 45 common animals", lambda: list(ANIMALS)),
    "animal_activities": (
        "the 45 animals in the paper's three activities, 'a cat washing the dishes'",
        lambda: [caption(Scene(a, 1, s)) for a, s in itertools.product(ANIMALS, ACTIVITIES)],
    ),
    "objects": (
        "24 inanimate objects, 'a teapot': new to who trained on animals",
        lambda: list(map(with_article, OBJECTS)),
    ),
    "object_activities": (
        "the same in the paper's three activities",
        lambda: [f"{with_article(o)} {SETTINGS[s]}" for o, s in itertools.product(OBJECTS, ACTIVITIES)],
    ),
    "counting": (
        "two to eight of the 45 animals, 'three cats'",
        lambda: [f"{n} {plural(a)}" for a, n in itertools.product(ANIMALS, NUMBERS)],
    ),
}


def named_sets() -> dict[str, str]:
    """Name -> what is in it."""
    emoji = make_manifest()["prompts"]
    sets = {name: f"{len(prompts)} captions of Emoji World, {prompts[0]!r}" for name, prompts in emoji.items()}
    return sets | {name: meaning for name, (meaning, _) in PAPER_SETS.items()}


def prompts_of(name: str) -> list[str]:
    """The prompts of one of `named_sets`."""
    return PAPER_SETS[name][1]() if name in PAPER_SETS else prompt_set(name)
