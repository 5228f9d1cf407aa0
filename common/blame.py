"""Whose fault is an exception: that of the work (a picture, an order), or that of the worker who did it?

A device that is lost or poisoned, and memory that runs out, fail whatever is tried next, and within milliseconds. To
charge that to the work would let one sick GPU set aside order after order. So the worker ends, and another takes its
place; the work goes back as if nobody had touched it.
"""

import re

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
