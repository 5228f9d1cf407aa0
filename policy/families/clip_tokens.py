"""What a CLIP text encoder is told of a prompt: token ids, as diffusers makes them.

Needs the tokenizer alone, so that prompts are looked at before anything heavy is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from common.errors import UserError
from conf.schema import ModelConfig
from policy.source import read_part

SHOWN = 60  # characters of a prompt in a sentence


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer, and what its text encoder takes."""

    tokenizer: CLIPTokenizer
    length: int  # of every prompt, padded or cut
    vocabulary: int  # how many tokens the text encoder knows

    @classmethod
    def load(cls, model: ModelConfig) -> "Tokens":
        """Raises UserError if the tokenizer cannot be read, or does not go with the text encoder."""
        transformers_logging.set_verbosity_error()  # of a prompt that is too long `check` says more, and that it is cut
        place: Any = {"pretrained_model_name_or_path": model.path, "revision": model.revision}
        tokenizer = read_part(model, "tokenizer", lambda: CLIPTokenizer.from_pretrained(**place, subfolder="tokenizer"))
        encoder = read_part(
            model, "text_encoder", lambda: CLIPTextConfig.from_pretrained(**place, subfolder="text_encoder")
        )
        if len(tokenizer) < 3:  # transformers makes up an empty one, of two special tokens, where the files are missing
            raise UserError(f"model.path={model.path} has no vocabulary in tokenizer/; download or save it again.")
        if not isinstance(encoder.eos_token_id, int):
            raise UserError(
                f"model.path={model.path} has eos_token_id={encoder.eos_token_id!r} in text_encoder/config.json; set "
                f"it to {tokenizer.eos_token_id}, which its tokenizer ends a prompt with."
            )
        length = tokenizer.model_max_length  # where it says nothing, transformers says 1e30
        if not isinstance(length, int | float) or length < 3:
            raise UserError(
                f"model.path={model.path} has model_max_length={length!r} in tokenizer/tokenizer_config.json; set it "
                f"to {encoder.max_position_embeddings}, which the text encoder takes."
            )
        return cls(tokenizer, int(min(length, encoder.max_position_embeddings)), encoder.vocab_size)

    def expanded(self, prompt: str) -> str:
        """A learned embedding of several vectors (textual inversion) stands in the vocabulary as <x>, <x>_1, ...; who
        writes <x> means all of them."""
        converted: str = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, self.tokenizer)
        return converted

    def count(self, prompt: str) -> int:
        """How many tokens a prompt has before it is padded or cut."""
        return len(self._ids(prompt))

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(self.expanded(prompt), verbose=False).input_ids
        return ids

    def encode(self, prompt: str) -> Any:
        """transformers' BatchEncoding of one prompt, padded or cut to the length: input_ids int64 [1, length]."""
        return self.tokenizer(
            self.expanded(prompt), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )

    def check(self, prompts: Sequence[str]) -> list[str]:
        """A sentence about the prompts that are cut, if there are any.

        Raises UserError if two prompts are one to the model: each would have statistics of its own.
        """
        seen: dict[tuple[int, ...], int] = {}
        cut: dict[int, int] = {}  # tokens of the prompts that have too many, by index
        for index, prompt in enumerate(prompts):
            ids = self._ids(prompt)
            if len(ids) > self.length:
                cut[index] = len(ids)
            if max(ids) >= self.vocabulary:
                raise UserError(
                    f"Prompt {index + 1} ({_start(prompt)}) has a token that the tokenizer knows ({max(ids)}) and the "
                    f"text encoder does not (0 to {self.vocabulary - 1}); save model.path again, with both from one "
                    "model, or change the prompt."
                )
            told = tuple(self.encode(prompt).input_ids[0].tolist())
            if told in seen:
                other = seen[told]
                why = f"cut after {self.length} tokens" if {index, other} & cut.keys() else "read by its tokenizer"
                raise UserError(
                    f"Prompts {other + 1} ({_start(prompts[other])}) and {index + 1} ({_start(prompt)}) are the same "
                    f"to the model, {why}; leave one of them out."
                )
            seen[told] = index
        if not cut:
            return []
        first, count = next(iter(cut.items()))
        return [
            f"{len(cut)} of {len(prompts)} prompts are longer than the {self.length} tokens that the model reads, and "
            f"are cut there: the first is {_start(prompts[first])}, of {count} tokens"
        ]


def _start(prompt: str) -> str:
    return repr(prompt if len(prompt) <= SHOWN else f"{prompt[:SHOWN]}…")
