"""A vision-language model that answers questions about pictures, in batches: what captions and counting are made of."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from conf.errors import UserError
from rewards.base import describe

# Models without a chat template, and how they were taught to be asked; others are given the question as it is.
PLAIN_PROMPTS = {"blip-2": "Question: {question} Answer:"}


class VisionLanguageModel:
    """Any image-text-to-text model of transformers: LLaVA, Qwen-VL, SmolVLM, BLIP-2, ...

    model: a folder or hub id with safetensors; dtype: of its weights; max_new_tokens: the longest answer. Runs on a
    GPU if the actor has one. Answers are greedy. Raises UserError.
    """

    def __init__(
        self, model: str, revision: str | None = None, dtype: str = "float32", max_new_tokens: int = 48
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.max_new_tokens = max_new_tokens
        try:
            self.processor = AutoProcessor.from_pretrained(model, revision=revision)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
            )
        except Exception as error:  # transformers, the hub and the disk raise all kinds, and it is the user who is told
            raise UserError(
                f"The vision-language model {model} cannot be loaded: {describe(error)}; give a folder or hub id of an "
                "image-text-to-text model whose weights are safetensors."
            ) from error
        self.model.eval().to(self.device)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # an answer begins right after its question, however long the others are
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model.generation_config.pad_token_id = tokenizer.pad_token_id

    def answer(self, images: np.ndarray, questions: Sequence[str]) -> list[str]:
        """An answer to each question about its picture; images: uint8 [B, H, W, 3]. White space is single spaces."""
        prompts = [self._prompt(question) for question in questions]
        answers = [""] * len(prompts)
        for rows in self._together(prompts):
            for row, text in zip(rows, self._generate(images[rows], [prompts[row] for row in rows]), strict=True):
                answers[row] = re.sub(r"\s+", " ", text).strip()
        return answers

    def _together(self, prompts: list[str]) -> list[list[int]]:
        """Rows that can be asked in one batch: all, but for BLIP those of equal length. The positions of its text
        decoder take no notice of padding, so an answer would depend on the neighbours' questions."""
        if self.model.config.model_type != "blip":
            return [list(range(len(prompts)))]
        groups: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(len(self.processor.tokenizer(prompt).input_ids), []).append(row)
        return list(groups.values())

    @torch.inference_mode()
    def _generate(self, images: np.ndarray, prompts: list[str]) -> list[str]:
        inputs = self.processor(
            images=[[Image.fromarray(image)] for image in images], text=prompts, padding=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
        )
        # What was generated, without the question before it, of which BLIP has dropped the end mark.
        asked = inputs["input_ids"].shape[1] - (self.model.config.model_type == "blip")
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens[:, asked:], skip_special_tokens=True)
        return texts

    def _prompt(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return text
        return PLAIN_PROMPTS.get(self.model.config.model_type, "{question}").format(question=question)
