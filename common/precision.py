"""float32 means float32."""


def exact_float32() -> None:
    """Switches TF32 off for this process, on CUDA: torch leaves it on for convolutions, and 10 bits of mantissa move
    log-ratios and rewards by more than clip ranges. Without a GPU nothing changes."""
    import torch  # here, because who only asks for a setting need not wait for it

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
