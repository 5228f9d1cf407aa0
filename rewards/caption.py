"""Does the picture show what the prompt says? A vision-language model describes it, and BERTScore compares.

Black et al. 2023, section 5.3: the reward is how much of "The image contains {prompt}" the description says.
"""

from collections.abc import Sequence

import numpy as np

from rewards.base import Scores
from rewards.bert_score import BertScore
from rewards.vision_language import VisionLanguageModel

EMPTY = 0.0  # the score of a picture about which the model says nothing: below that of any words


class CaptionRecall:
    """BERTScore recall of the model's description against the prompt; stores `caption`, and whether it is `empty`.

    model, revision, dtype, max_new_tokens: see `VisionLanguageModel`; question: what it is asked; reference: what a
    description is compared with, {prompt} being the prompt; text_model, text_layer: see `BertScore`.
    """

    def __init__(
        self,
        model: str = "llava-hf/llava-1.5-7b-hf",
        revision: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 48,
        question: str = "Answer concisely: what is going on in this image?",
        reference: str = "The image contains {prompt}",
        text_model: str = "microsoft/deberta-xlarge-mnli",
        text_layer: int | None = None,
    ) -> None:
        self.captioner = VisionLanguageModel(model, revision, dtype, max_new_tokens)
        self.bert_score = BertScore(text_model, text_layer)
        self.question, self.reference = question, reference

    def __call__(self, images: np.ndarray, prompts: list[str]) -> Scores:
        captions = self.captioner.answer(images, [self.question] * len(images))
        references = [self.reference.replace("{prompt}", prompt) for prompt in prompts]
        empty = [not any(letter.isalnum() for letter in caption) for caption in captions]
        scores = np.where(empty, np.float32(EMPTY), self.bert_score.recall(captions, references))
        return Scores(scores, {"caption": captions, "empty": empty})

    def check_trial(self, prompts: Sequence[str], scores: Scores) -> None:
        """See `try_out`."""
        self.captioner.check_it_speaks(list(scores.columns["caption"]))
