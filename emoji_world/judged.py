"""The judge of Emoji World in a run's evaluations, beside the rewards and never one of them."""

import numpy as np

from common.errors import UserError
from emoji_world.classifier import right
from rewards.base import Scores


class Judged:
    """1 where the classifier, which saw rendered pictures only, finds the prompt's animal, number and setting, else 0;
    and each of the three in a column."""

    def __call__(self, images: np.ndarray, prompts: list[str]) -> Scores:
        try:
            hits = right(images, prompts)
        except ValueError as error:
            raise UserError(
                f"The judge knows prompts of Emoji World alone: {error}. Leave it out: evaluation.rewards=[...] with "
                "the other rewards' names."
            ) from error
        return Scores(np.logical_and.reduce([*hits.values()]).astype(np.float32), hits)
