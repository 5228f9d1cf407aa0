"""What can be refused of a model and its LoRA before an actor starts: no weights are read, but those of a LoRA file."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from common.blame import for_the_user_to_mend
from conf.schema import ModelConfig, SamplingConfig
from policy import lora, lora_file
from policy.source import family_of


@dataclass(frozen=True)
class Checked:
    image_size: tuple[int, int]  # (height, width) of the run's pictures
    remarks: list[str]  # what the user should know of his prompts


def check_policy(model: ModelConfig, sampling: SamplingConfig, prompts: Sequence[str]) -> Checked:
    """Raises UserError if scheduler, size, LoRA or prompts give no policy."""
    with of_the_users_own(model):
        family = family_of(model)
        size = family.check(model, sampling)
        check_lora(model)
        return Checked(size, family.check_prompts(model, prompts))


def of_the_users_own(model: ModelConfig) -> AbstractContextManager[None]:
    """What a user's own family raises here is for him to mend."""
    return for_the_user_to_mend(f"model.family={model.family}", "mend it") if model.family else nullcontext()


def check_lora(model: ModelConfig) -> None:
    """Raises UserError if model.lora does not fit the model's network."""
    family = family_of(model)
    network = family.without_weights(model)
    lora.inject(network, model.lora, 0, torch.float32)
    if model.lora.init_from is not None:
        source = f"model.lora.init_from={model.lora.init_from}"
        layers = lora_file.read(Path(model.lora.init_from), family.without_weights(model), source, family)
        lora.start_from(layers, network, model.lora, source)
