"""Whose fault is an exception: that of the work (a picture, an order), or that of the worker who did it?

A device that is lost or poisoned, and memory that runs out, fail whatever is tried next, and within milliseconds. To
charge that to the work would let one sick GPU set aside order after order. So the worker ends, and another takes its
place; the work goes back as if nobody had touched it.
"""

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

# By name, so that who asks need not import them: classes of torch (AcceleratorError since 2.8), Python and others.
ERRORS_OF_THE_WORKER = frozenset(
    "AcceleratorError OutOfMemoryError MemoryError DeferredCudaCallError CudaAPIError CUDARuntimeError "
    "ResourceExhaustedError".split()
)
# Libraries below torch mostly raise a bare RuntimeError, which only its text tells from one of the work. A text may
# hold a prompt, so these are the words of libraries and nobody else's.
WORDS_OF_THE_WORKER = re.compile(
    r"\b(CUDA|HIP|cuDNN|CUBLAS|CUSOLVER|CUFFT|CURAND|CUSPARSE|NCCL|MIOpen|HSA|XPU|Triton) "
    r"((driver|unknown|frontend) )?error"
    r"|\bMPS backend|\bcommand buffer exited with error|\bUR_RESULT_ERROR_|\bNVML_\w+|\bCUDACachingAllocator"
    r"|\b(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|CURAND|HIPBLAS|ROCBLAS|MIOPEN)_STATUS_|\b(CUDA|HIP)_ERROR_"
    r"|\b(cuda|hip)(Error|Malloc|GetDevice)\w*|\bno kernel image is available|\bdevice-side assert"
    r"|\billegal memory access|\bECC error|\bGPU is lost|\bfallen off the bus",
    re.IGNORECASE,
)
# What a smaller piece of work may be the answer to. A device that is poisoned stays so, whatever is asked of it next.
OUT_OF_MEMORY = re.compile(
    r"(^|\b(CUDA|HIP|XPU|ROCm|MPS backend|device|error)[: ]+)out of memory\b"
    r"|can(not|'t) allocate memory|^not enough memory|not enough memory: you tried|unable to mmap"
    r"|_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the host, and nothing else is wrong with either."""
    if _is_a(error, {"OutOfMemoryError", "MemoryError", "ResourceExhaustedError"}):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(_text(error)))


def is_the_workers(error: BaseException | None) -> bool:
    """Whether an error is of the device or of memory, itself or by what caused it."""
    return any(
        _is_a(one, ERRORS_OF_THE_WORKER)
        or (
            isinstance(one, RuntimeError | OSError)
            and bool(WORDS_OF_THE_WORKER.search(_text(one)) or OUT_OF_MEMORY.search(_text(one)))
        )
        for one in _chain(error, set())
    )


def describe(error: BaseException, longest: int = 10**6) -> str:
    """An exception in one line, each message in at most `longest` characters: what it says, where it was raised, and
    what caused it in the end.

    Example: "KeyError: 'cat' (my_rewards.py:12)"
    """
    first, *causes = _chain(error, set())
    found = f"{_named(first, longest)}{_place(first)}"
    return f"{found}, caused by {_named(causes[-1], longest)}{_place(causes[-1])}" if causes else found


@contextmanager
def for_the_user_to_mend(what: str, fix: str) -> Iterator[None]:
    """What is raised here becomes a UserError, "what: error; fix.": files, hubs and classes are the user's, and raise
    anything. But an error of the device or of memory passes as it is, and so does a UserError."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | GeneratorExit) or is_the_workers(error):
            raise
        raise UserError(f"{what}: {describe(error, 200)}; {fix}.") from error


def writable(text: str) -> str:
    """In signs that every file takes: a name that was never UTF-8 brings others."""
    return text.encode("utf-8", "backslashreplace").decode()


def shortened(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis, `length` characters in all."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
    """The error, those that it groups, and what caused them, each once."""
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        for one in error.exceptions if isinstance(error, BaseExceptionGroup) else ():
            yield from _chain(one, seen)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_a(error: BaseException, names: frozenset[str] | set[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _text(error: BaseException) -> str:
    """What it says."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (its own method is broken, and its class says who it is)
        return ""
    return writable(text)


def _named(error: BaseException, longest: int) -> str:
    text = shortened(" ".join(_text(error).split()), longest)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """File and line of the last call outside all libraries, where its author looks first. "" if there is none."""
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    calls = [
        call for call in traceback.extract_tb(error.__traceback__) if not call.filename.startswith(("<", *libraries))
    ]
    return f" ({Path(calls[-1].filename).name}:{calls[-1].lineno})" if calls else ""
