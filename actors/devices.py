"""Which GPUs an actor may use: those that Ray reserved for it, and no others."""

import os

import ray

# As Ray 2.60 names them, one a kind of accelerator.
VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
    "HABANA_VISIBLE_MODULES",
    "NEURON_RT_VISIBLE_CORES",
    "RBLN_DEVICES",
    "TPU_VISIBLE_CHIPS",
)


def hide_unreserved_gpus() -> None:
    """In an actor without a reservation: every GPU is out of sight.

    Ray leaves them all visible there, and code that asks `torch.cuda.is_available()` would use GPU 0 beside the
    learner. Call it first: CUDA reads its variable once.
    """
    if not ray.get_gpu_ids():
        os.environ.update(dict.fromkeys(VISIBLE, ""))
