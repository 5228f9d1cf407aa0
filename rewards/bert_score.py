"""How much of a reference text a candidate says: BERTScore recall (Zhang et al. 2020), as Black et al. 2023 use it."""

from functools import lru_cache

import numpy as np
import torch
from torchmetrics.functional.text import bert_score
from transformers import AutoModel, AutoTokenizer

from common.blame import for_the_user_to_mend
from common.errors import UserError

LONGEST = 128  # tokens of a text; what is beyond is cut off


class BertScore:
    """Recall: for each token of the reference, the largest cosine with any token of the candidate, averaged.

    Neither rescaled by a baseline nor weighted by frequency. model: a text encoder of transformers, folder or hub id;
    layer: whose hidden states are compared, the last if None. Raises UserError.
    """

    def __init__(self, model: str, layer: int | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fix = "give a folder or hub id of a text encoder such as microsoft/deberta-xlarge-mnli"
        with for_the_user_to_mend(f"The text model {model} cannot be loaded", fix):
            self.tokenizer = AutoTokenizer.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, dtype=torch.float32).eval().to(self.device)
        layers = self.model.config.num_hidden_layers
        if layer is not None and not 0 <= layer <= layers:
            raise UserError(f"text_layer={layer} is not a layer of the text model {model}: choose 0 to {layers}.")
        self.layer = layer
        self._recall = lru_cache(maxsize=10_000)(self._recall_of_one)

    def recall(self, candidates: list[str], references: list[str]) -> np.ndarray:
        """float32 [B] of B pairs."""
        return np.array([self._recall(*pair) for pair in zip(candidates, references, strict=True)], np.float32)

    def _recall_of_one(self, candidate: str, reference: str) -> float:
        # One pair a call: torchmetrics 1.9 sorts texts by length and puts scores of longer lists back in a wrong
        # order. A caption comes with the same prompt again and again, so most pairs are remembered anyway.
        score = bert_score(
            [candidate],
            [reference],
            num_layers=self.layer,
            model=self.model,
            user_tokenizer=self.tokenizer,
            device=self.device,
            max_length=LONGEST,
            truncation=True,
        )
        return float(torch.as_tensor(score["recall"]))
