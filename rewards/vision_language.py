"""A vision-language model that answers questions about pictures, in batches: what captions and counting are made of."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.blame import for_the_user_to_mend
from common.errors import UserError

DTYPES = ("float32", "bfloat16", "float16", "float64")
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
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype} is no format of a model's weights: choose {', '.join(DTYPES)}.")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for an answer: give a whole number from 1."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name = model
        self.max_new_tokens = max_new_tokens
        fix = "give a folder or hub id of an image-text-to-text model whose weights are safetensors"
        with for_the_user_to_mend(f"The vision-language model {model} cannot be loaded", fix):
            self.processor = AutoProcessor.from_pretrained(model, revision=revision)
            self.model = AutoModelForImageTextToText.from_pretrained(
                model, revision=revision, dtype=getattr(torch, dtype), use_safetensors=True
            )
        self.model.eval().to(self.device)
        configs = self.model.config, self.model.config.get_text_config()
        self.has_encoder = any(config.is_encoder_decoder for config in configs)  # of the question, as T5's
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

    def check_it_speaks(self, answers: Sequence[str]) -> None:
        """Raises UserError where none of the answers about the pictures of the trial has a word in it: such a model
        would give every picture the same score. A model that describes pictures has a word for noise, too."""
        if not any(letter.isalnum() for text in answers for letter in text):
            raise UserError(
                f"The vision-language model {self.name} answered nothing about the two pictures of the trial "
                f"({list(answers)!r:.100}), and would score every picture alike: give another, or another question."
            )

    def _together(self, prompts: list[str]) -> list[list[int]]:
        """Rows that can be asked in one batch: all, or those of equal length where padding moves positions and an
        answer would depend on the neighbours' questions: in BLIP's decoder, behind an encoder (between picture and
        question), and in InstructBLIP's Q-Former."""
        former = getattr(self.processor, "qformer_tokenizer", None)
        if not (former or self.has_encoder or self.model.config.model_type == "blip"):
            return [list(range(len(prompts)))]
        tokenizers = [self.processor.tokenizer, *([former] if former else [])]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(tuple(len(each(prompt).input_ids) for each in tokenizers), []).append(row)
        return list(groups.values())

    @torch.inference_mode()
    def _generate(self, images: np.ndarray, prompts: list[str]) -> list[str]:
        inputs = self.processor(
            images=[[Image.fromarray(image)] for image in images], text=prompts, padding=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        if "input_ids" not in inputs:
            raise UserError(f"The vision-language model {self.name} reads no question: give another, such as LLaVA.")
        tokens = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
        )
        # Most decoders repeat the question before their answer, of which BLIP drops the end mark; encoders read it.
        asked = inputs["input_ids"]
        if self.model.config.model_type == "blip":
            asked = asked[:, :-1]
        is_repeated = not self.has_encoder and torch.equal(tokens[:, : asked.shape[1]], asked)
        repeated = asked.shape[1] if is_repeated else 0
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens[:, repeated:], skip_special_tokens=True)
        return texts

    def _prompt(self, question: str) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text: str = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            return text
        return PLAIN_PROMPTS.get(self.model.config.model_type, "{question}").format(question=question)
