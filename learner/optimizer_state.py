"""AdamW's state as tensors by the parameter's name, so that it needs no pickle and no order of parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PARTS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_state(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the CPU, "<name>.<part>"; empty before the first step."""
    return {
        f"{name}.{part}": optimizer.state[parameter][part].detach().to("cpu", copy=True)
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for part in PARTS
    }


def load_optimizer_state(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Puts `state` in place of what `optimizer` has. Raises KeyError if a parameter's part is missing."""
    optimizer.state.clear()
    for name, parameter in parameters.items() if state else ():
        optimizer.state[parameter] = {
            # AdamW keeps its step count on the CPU
            part: state[f"{name}.{part}"].to("cpu" if part == "step" else parameter.device, copy=True)
            for part in PARTS
        }
