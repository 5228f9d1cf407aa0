"""What can be asked about a picture of Emoji World, and the right answers: what the captioner learns from.

Besides scenes there are settings without an animal and pictures of nothing, so that it does not see a cat wherever
it is asked about cats.
"""

import numpy as np

from prompts.scenes import ANIMALS, SETTINGS, Scene, caption, plural

CAPTION_QUESTIONS = (
    "Answer concisely: what is going on in this image?",  # of Black et al. 2023
    "What is going on in this image?",
    "What is in this image?",
    "Describe this image.",
)
ANIMAL_QUESTIONS = ("What animal?", "What animal is in this image?", "What animals are in this image?")
PLACE_QUESTIONS = ("Where?", "Where is this?", "What are they doing?", "What is it doing?")
NUMBER_QUESTIONS = ("How many {animals} are there?", "How many {animals} are there in this image?")
COUNTS = ("zero", "one", "two", "three", "four")
NOTHING = "nothing"
NO_ANIMAL = "no animal"


def describe(scene: Scene | None) -> str:
    """The caption of a scene; a scene of number 0 is an empty setting, None a picture of nothing."""
    if scene is None:
        return NOTHING
    return f"{NO_ANIMAL} {SETTINGS[scene.setting]}" if scene.number == 0 else caption(scene)


def draw_question(scene: Scene | None, rng: np.random.Generator) -> tuple[str, str]:
    """A question about a picture of `scene`, and its answer. Half of them ask for the caption."""
    draw = rng.random()
    if draw < 0.5:
        return _pick(rng, CAPTION_QUESTIONS), describe(scene)
    if draw < 0.75:
        shown = scene is not None and scene.number > 0 and rng.random() < 0.7
        asked = scene.animal if scene and shown else _pick(rng, ANIMALS)
        count = scene.number if scene and asked == scene.animal else 0
        return _pick(rng, NUMBER_QUESTIONS).format(animals=plural(asked)), COUNTS[count]
    if draw < 0.9:
        name = "none" if scene is None or scene.number == 0 else scene.animal
        return _pick(rng, ANIMAL_QUESTIONS), plural(name) if scene and scene.number > 1 else name
    return _pick(rng, PLACE_QUESTIONS), NOTHING if scene is None else SETTINGS[scene.setting]


def all_texts() -> list[str]:
    """Every question and answer there is, for tokenizers to learn their words from."""
    questions = [*CAPTION_QUESTIONS, *ANIMAL_QUESTIONS, *PLACE_QUESTIONS, *NUMBER_QUESTIONS]
    scenes = [Scene(animal, number, setting) for animal in ANIMALS for number in range(5) for setting in SETTINGS]
    return [*questions, *COUNTS, "none", *ANIMALS, *map(plural, ANIMALS), *map(describe, [None, *scenes])]


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[rng.integers(len(choices))]
