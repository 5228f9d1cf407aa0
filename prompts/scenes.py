"""What Emoji World can show, how a caption says it, and which prompts reinforcement learning may train on.

A scene is a kind of animal, how many of them (1 to 4), and a setting: a place or an activity. This file needs no
library but Python's own, because every run reads its prompts from here.

    python -m prompts.scenes        # writes manifest.json again
"""

import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.terminal import print_anywhere

# The 45 common animals of the DDPO paper, in its order.
ANIMALS = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo".split()
)
PLURALS = {
    "sheep": "sheep",
    "deer": "deer",
    "fish": "fish",
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
    "fox": "foxes",
    "butterfly": "butterflies",
    "fly": "flies",
}
NUMBER_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}
PLACES = {
    "beach": "on the beach",
    "forest": "in the forest",
    "snow": "in the snow",
    "desert": "in the desert",
    "sea": "in the sea",
    "city": "in the city",
    "space": "in space",
    "meadow": "in a meadow",
}
ACTIVITIES = {"dishes": "washing the dishes", "bike": "riding a bike", "chess": "playing chess"}
SETTINGS = {**PLACES, **ACTIVITIES}

# Words that no picture of Emoji World is called by: what a finetuned model does with them it was not trained to do.
OBJECTS = (
    "apple car chair clock cup door guitar hammer kettle key lamp ladder piano pencil robot ship shoe spoon sofa tent "
    "teapot train umbrella violin"
).split()

# The split for reinforcement learning: every third animal, two places and one activity are never finetuned on.
HELD_OUT_ANIMALS = ANIMALS[2::3]
HELD_OUT_PLACES = ("space", "meadow")
HELD_OUT_ACTIVITIES = ("chess",)
FINETUNE_ANIMALS = tuple(a for a in ANIMALS if a not in HELD_OUT_ANIMALS)
FINETUNE_PLACES = tuple(p for p in PLACES if p not in HELD_OUT_PLACES)
FINETUNE_ACTIVITIES = tuple(a for a in ACTIVITIES if a not in HELD_OUT_ACTIVITIES)

MANIFEST = Path(__file__).parent / "manifest.json"


@dataclass(frozen=True)
class Scene:
    """`number` animals of one kind; `setting` is a key of SETTINGS, or "" where a caption leaves it open."""

    animal: str
    number: int
    setting: str


def plural(animal: str) -> str:
    return PLURALS.get(animal, animal + "s")


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """The one canonical caption of a scene, such as "two mice in the snow"."""
    if scene.number == 1:
        subject = with_article(scene.animal)
    else:
        subject = f"{NUMBER_WORDS[scene.number]} {plural(scene.animal)}"
    return f"{subject} {SETTINGS[scene.setting]}" if scene.setting else subject


def parse(text: str) -> Scene:
    """The scene of a caption. Reads all that `caption` writes, "one", digits ("3 cats"), a bare animal ("cat"),
    sentences ("a cat is riding a bike") and "on a bike"."""
    words = [word for word in text.lower().strip().rstrip(".").split() if word not in ("is", "are")]
    counts = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "1": 1, "2": 2, "3": 3, "4": 4}
    number = counts[words.pop(0)] if words and words[0] in counts else 1
    name, setting_text = (words[0] if words else ""), " ".join(words[1:])
    setting_text = SETTINGS["bike"] if setting_text == "on a bike" else setting_text
    animal = next((a for a in ANIMALS if name in (a, plural(a))), None)
    setting = next((key for key, phrase in {"": "", **SETTINGS}.items() if phrase == setting_text), None)
    if animal is None or setting is None:
        raise ValueError(f"not a caption of Emoji World: {text!r} (expected something like 'two cats in the snow')")
    return Scene(animal, number, setting)


def all_scenes() -> list[Scene]:
    """Every scene with a setting: 45 animals x 4 numbers x 8 places, and 45 single animals x 3 activities."""
    places = [Scene(a, n, p) for a, n, p in itertools.product(ANIMALS, NUMBER_WORDS, PLACES)]
    return places + [Scene(a, 1, s) for a, s in itertools.product(ANIMALS, ACTIVITIES)]


def _captions(animals: tuple[str, ...], numbers: tuple[int, ...], settings: tuple[str, ...]) -> list[str]:
    return [caption(Scene(a, n, s)) for a, n, s in itertools.product(animals, numbers, settings)]


def _sentences(subjects: Iterable[str], settings: Iterable[str]) -> list[str]:
    """Such as "a cat is riding a bike"."""
    return [f"{with_article(subject)} is {SETTINGS[s]}" for subject, s in itertools.product(subjects, settings)]


def _on_a_bike(animals: tuple[str, ...]) -> list[str]:
    return [f"{text} on a bike" for text in _captions(animals, (2, 3, 4), ("",))]


def _spread(captions: list[str], count: int) -> list[str]:
    """`count` of the captions, far apart in the list, by a stride that is prime to its length."""
    stride = next(s for s in range(int(len(captions) * 0.618), len(captions)) if math.gcd(s, len(captions)) == 1)
    return [captions[i * stride % len(captions)] for i in range(count)]


def make_manifest() -> dict[str, Any]:
    """The split and the named prompt sets; manifest.json holds exactly this."""
    numbers = tuple(NUMBER_WORDS)
    finetune = _captions(FINETUNE_ANIMALS, numbers, FINETUNE_PLACES)
    held_out = _captions(HELD_OUT_ANIMALS, numbers, HELD_OUT_PLACES)
    return {
        "finetune": {
            "animals": list(FINETUNE_ANIMALS),
            "places": list(FINETUNE_PLACES),
            "activities": list(FINETUNE_ACTIVITIES),
        },
        "held_out": {
            "animals": list(HELD_OUT_ANIMALS),
            "places": list(HELD_OUT_PLACES),
            "activities": list(HELD_OUT_ACTIVITIES),
        },
        "prompts": {
            # The default training set, small enough that each prompt comes back often (per-prompt advantages).
            "emoji_finetune": _spread(finetune, 48),
            "emoji_finetune_all": finetune,
            # Nothing in these was finetuned on: neither the animal nor the place.
            "emoji_held_out": _spread(held_out, 48),
            "emoji_held_out_all": held_out,
            "emoji_held_out_animals": _spread(_captions(HELD_OUT_ANIMALS, numbers, FINETUNE_PLACES), 48),
            "emoji_activities": _captions(FINETUNE_ANIMALS, (1,), FINETUNE_ACTIVITIES),
            "emoji_held_out_activities": _captions(HELD_OUT_ANIMALS, (1,), HELD_OUT_ACTIVITIES),
            # The paper's bare prompts: "a cat", and "two cats" for counting.
            "emoji_animals": _captions(FINETUNE_ANIMALS, (1,), ("",)),
            "emoji_held_out_animals_bare": _captions(HELD_OUT_ANIMALS, (1,), ("",)),
            "emoji_counting": _captions(FINETUNE_ANIMALS, (2, 3, 4), ("",)),
            "emoji_held_out_counting": _captions(HELD_OUT_ANIMALS, (2, 3, 4), ("",)),
            # What pretraining did not teach, so that there is something to gain: the base model draws familiar
            # captions right nine times in ten and more (docs/results.md).
            "emoji_activity_sentences": _sentences(ANIMALS, ACTIVITIES),
            "emoji_counting_on_a_bike": _on_a_bike(ANIMALS),
            # The same for two thirds of the animals and two of the activities, and what is new to who trained on them.
            "emoji_sentences_finetune": _sentences(FINETUNE_ANIMALS, FINETUNE_ACTIVITIES),
            "emoji_sentences_held_out_animals": _sentences(HELD_OUT_ANIMALS, FINETUNE_ACTIVITIES),
            "emoji_sentences_held_out_activities": _sentences(FINETUNE_ANIMALS, HELD_OUT_ACTIVITIES),
            "emoji_sentences_places": _spread(_sentences(FINETUNE_ANIMALS, PLACES), 48),
            "emoji_sentences_objects": _sentences(OBJECTS, FINETUNE_ACTIVITIES),
            "emoji_counting_on_a_bike_finetune": _on_a_bike(FINETUNE_ANIMALS),
            "emoji_counting_on_a_bike_held_out_animals": _on_a_bike(HELD_OUT_ANIMALS),
            "emoji_all": [caption(scene) for scene in all_scenes()],
        },
    }


def prompt_set(name: str) -> list[str]:
    """The prompts of a named set in manifest.json, in a fixed order."""
    sets: dict[str, list[str]] = json.loads(MANIFEST.read_text(encoding="utf-8"))["prompts"]
    if name not in sets:
        raise ValueError(f"no prompt set {name!r}; there are {', '.join(sorted(sets))}")
    return sets[name]


if __name__ == "__main__":
    print_anywhere()
    MANIFEST.write_text(json.dumps(make_manifest(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {MANIFEST.name}: " + ", ".join(f"{k} {len(v)}" for k, v in make_manifest()["prompts"].items()))
