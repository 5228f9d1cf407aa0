"""Whose fault an exception is, and how it is said."""

import asyncio
import pickle

import pytest
import torch

from actors.ending import WorkerFailed, judged
from common.blame import describe, is_out_of_memory, is_the_workers
from common.errors import RunStopped, UserError

# One text for each word that tells a library's error; classes are in rewards/test_answers.py.
TEXTS = [
    "CUDA error: an illegal memory access was encountered",
    "HIP error: unspecified launch failure",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph",
    "NCCL error: unhandled system error",
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "CUDA driver error: unknown error",
    "Triton Error [CUDA]: misaligned address",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "call to cuMemAlloc results in CUDA_ERROR_ILLEGAL_ADDRESS",
    "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized",
    "cudaMalloc failed",
    "hipErrorNoBinaryForGpu: Unable to find code object for all current devices!",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016",
    "MPS backend: command buffer exited with error status",
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "no kernel image is available for execution on the device",
    "device-side assert triggered",
    "uncorrectable ECC error encountered",
    "GPU is lost. Reboot the system to recover this GPU",
    "GPU has fallen off the bus",
]
MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "HIP out of memory. Tried to allocate 2.00 GiB",
    "MPS backend out of memory (MPS allocated: 17 GB)",
    "out of memory",
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
    "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "unable to mmap 8589934592 bytes from file </model.safetensors>: Cannot allocate memory (12)",
]


@pytest.mark.parametrize("text", [*TEXTS, *MEMORY])
def test_libraries_words_are_known(text: str) -> None:
    assert is_the_workers(RuntimeError(text))
    assert is_out_of_memory(RuntimeError(text)) is (text in MEMORY)


@pytest.mark.parametrize(
    "text",
    [
        "cannot score 'a robot that runs out of memory'",
        "no face in the picture of 'two dogs'",
        "expected 3 channels, got 4",
        "the service is down",
    ],
)
def test_what_is_said_of_a_picture_is_not_taken_for_them(text: str) -> None:
    assert not is_the_workers(RuntimeError(text))


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("the captioner failed") from cause
    except RuntimeError as found:
        return found


def test_an_error_is_judged_by_its_causes_and_by_those_that_it_groups() -> None:
    sick = RuntimeError("CUDA error: device-side assert triggered")
    assert is_the_workers(wrapped(sick))
    assert is_the_workers(ExceptionGroup("several", [ValueError("a picture"), wrapped(sick)]))
    assert not is_the_workers(ExceptionGroup("several", [ValueError("a picture")]))


def test_the_sentence_has_place_and_cause() -> None:
    sentence = describe(wrapped(MemoryError("2 GiB")))
    assert sentence.startswith("RuntimeError: the captioner failed (test_blame.py:")
    assert "), caused by MemoryError: 2 GiB (test_blame.py:" in sentence


def test_any_exception_has_a_sentence_that_can_be_written() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            return None  # type: ignore[return-value]

    assert describe(Silent()) == "Silent"
    assert describe(FileNotFoundError("/data/caf\udce9.png")) == r"FileNotFoundError: /data/caf\udce9.png"


class GpuGone(RuntimeError):
    """It does not survive pickling, as many exceptions of libraries."""

    def __init__(self, device: str, code: int) -> None:
        super().__init__(f"CUDA error {code} on {device}")


@pytest.mark.parametrize(
    ("error", "blameless"),
    [(GpuGone("cuda:0", 700), True), (wrapped(MemoryError()), True), (wrapped(KeyError("cat")), False)],
)
def test_a_worker_is_judged_where_it_failed_and_the_verdict_travels(error: Exception, blameless: bool) -> None:
    @judged
    def run() -> None:
        raise error

    with pytest.raises(WorkerFailed) as caught:
        run()
    arrived = pickle.loads(pickle.dumps(caught.value))
    assert arrived.blameless is blameless and arrived.sentence == describe(error)


@pytest.mark.parametrize("error", [UserError("mend it"), RunStopped("the disk is full"), asyncio.CancelledError()])
def test_what_ends_the_run_or_the_process_is_left_as_it_is(error: BaseException) -> None:
    @judged
    def run() -> None:
        raise error

    with pytest.raises(type(error)):
        run()


def test_torchs_own_classes_are_known() -> None:
    assert is_the_workers(torch.AcceleratorError("CUDA error: device-side assert triggered"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
