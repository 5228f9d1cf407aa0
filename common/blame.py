"""Whose fault is an exception: that of the work (a picture, an order), or that of the worker who did it?

A device that is lost or poisoned, and memory that runs out, fail whatever is tried next, and within milliseconds. To
charge that to the work would let one sick GPU set aside order after order. So the worker ends, and another takes its
place; the work goes back as if nobody had touched it.
"""

import re
import sysconfig
import traceback
from pathlib import Path

# By name, so that who asks need not import torch: classes of torch (AcceleratorError since 2.8) and of Python.
ERRORS_OF_THE_WORKER = frozenset({"AcceleratorError", "OutOfMemoryError", "MemoryError", "DeferredCudaCallError"})
# Libraries below torch mostly raise a bare RuntimeError, which only its text tells from one of the work.
WORDS_OF_THE_WORKER = re.compile(
    r"\b(CUDA|HIP|cuDNN|CUBLAS|CUSOLVER|CUFFT|CURAND|CUSPARSE|NCCL|MIOpen|HSA|XPU) (driver )?error"
    r"|\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|CURAND|HIPBLAS|ROCBLAS|MIOPEN)_STATUS_|\bcuda(Error|Malloc)\w*"
    r"|out of memory|can('t|not) allocate memory|not enough memory|unable to mmap|no kernel image is available"
    r"|device-side assert|illegal memory access|ECC error|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)
# What a smaller piece of work may be the answer to. A device that is poisoned stays so, whatever is asked of it next.
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CU(BLAS|DNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the host, and nothing else is wrong with either."""
    if any(kind.__name__ in ("OutOfMemoryError", "MemoryError") for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def is_the_workers(error: BaseException | None) -> bool:
    """Whether an error is of the device or of memory, itself or by what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if any(kind.__name__ in ERRORS_OF_THE_WORKER for kind in type(error).__mro__):
            return True
        if isinstance(error, RuntimeError | OSError) and WORDS_OF_THE_WORKER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe(error: BaseException, longest: int = 10**6) -> str:
    """An exception in one line, its message in at most `longest` characters, and where it was raised.

    Example: "KeyError: 'cat' (my_rewards.py:12)"
    """
    text = shortened(" ".join(str(error).split()), longest)
    place = _place(error)
    return f"{type(error).__name__}{': ' * bool(text)}{text}{f' ({place})' * bool(place)}"


def _place(error: BaseException) -> str:
    """File and line of the last call that is in no library: what whoever wrote it looks for. "" if there is none."""
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    own = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(("<", *libraries))
    ]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis, `length` characters in all."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
