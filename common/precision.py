"""float32 means float32, and torch's own settings are the run's, whatever a user's class makes of them."""

from collections.abc import Iterator
from contextlib import contextmanager


def exact_float32() -> None:
    """Switches TF32 off for this process, on CUDA: torch leaves it on for convolutions, and 10 bits of mantissa move
    log-ratios and rewards by more than clip ranges. Without a GPU nothing changes."""
    import torch  # here, because who only asks for a setting need not wait for it

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def settings_kept() -> Iterator[None]:
    """Inside, code of a user's may switch gradients off or set the default dtype, as programs do that only look at
    pictures; afterwards they are as before. A policy may be trained in the same process."""
    import torch

    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
