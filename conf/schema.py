"""The typed configuration: every setting, its type, its default, and what it means.

`conf/default.yaml` holds nothing but the choice of the embedded model's experiment; the defaults live here, beside
their meaning. An experiment (`conf/experiment/*.yaml`) overrides them, the command line overrides the experiment.
The comment at the end of a setting's line is its meaning in `python launch.py --help`, too: every setting has one.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Texts = list[str]  # by a name of its own, because a field called `list` hides the type


class DType(StrEnum):
    """Floating-point formats of weights and stored latents, by their torch names."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"  # for checking numerics; no run takes it, as log-probs are stored in float32


class Algorithm(StrEnum):
    """The two policy-gradient estimators of DDPO (Black et al. 2023, section 4.3)."""

    ddpo_is = "ddpo_is"
    ddpo_sf = "ddpo_sf"


class Combine(StrEnum):
    """How several rewards become the one that is trained on."""

    sum = "sum"
    product = "product"


class GuidanceGradient(StrEnum):
    """Through which halves of classifier-free guidance the learner differentiates."""

    full = "full"
    conditional = "conditional"


@dataclass
class RunConfig:
    name: str = "${experiment}"  # folder under run.dir; the same name again resumes the run
    dir: str = "runs"  # where run folders lie: the head's disk or a file system that all hosts share
    seed: int = 0  # every random number of the run follows from it
    batches: int = 40  # how many batches to train; may be raised when resuming
    mirror: str | None = None  # a URI (s3://…, gs://…, file:///…): batches are copied to <name> under it as they come


@dataclass
class LoraConfig:
    rank: int = 8  # of the low-rank update of each adapted projection
    alpha: float = 8.0  # the update is scaled by alpha / rank
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # module name endings
    init_from: str | None = None  # a LoRA saved by diffusers (file or folder) to start from


@dataclass
class ModelConfig:
    path: str = "emoji_world/weights/pipeline"  # a diffusers pipeline: folder or hub id
    revision: str | None = None  # a hub revision
    variant: str | None = None  # for example fp16
    dtype: DType = DType.float32  # of the frozen weights and the network's arithmetic; LoRA weights are float32
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class PromptsConfig:
    """What to finetune on: exactly one of the three."""

    set: str | None = None  # a named set, one of those below
    list: Texts | None = None  # the prompts themselves
    file: str | None = None  # a text file, one prompt a line


@dataclass
class SamplingConfig:
    steps: int = 50  # denoising steps, the length T of the MDP's episode
    eta: float = 1.0  # DDIM's eta; 0 is deterministic and has no policy gradient
    guidance: float = 5.0  # classifier-free guidance scale, in rollout and in training
    latents_dtype: DType = DType.float32  # as stored; log-probs are computed on the rounded latents


@dataclass
class BufferConfig:
    batch_size: int = 64  # trajectories a batch
    order_size: int = 16  # trajectories an order, the unit that moves; at least four orders a batch
    max_staleness: int = 0  # k: data trained at version u are of version >= u - k; 0 is the synchronous algorithm
    keep_batches: int = 2  # trained batches whose tensors are kept; scalars are kept for ever
    claim_timeout_s: float = 600.0  # an older claim is offered to another sampler, after twice it the first dies
    max_failed_share: float = 0.1  # of a batch's trajectories that may be set aside before the run stops


@dataclass
class WorkerConfig:
    count: int = 1  # actors; at buffer.max_staleness=0 the data are the same however many
    num_cpus: float = 1.0  # of one actor, by which Ray places it
    num_gpus: float = 1.0  # of one actor; taken as 0, and said so, on a cluster without GPUs
    threads: int = 1  # torch threads of one actor; last bits of results depend on it


@dataclass
class RewardConfig:
    path: str = "???"  # a built-in name (see docs/rewards.md) or module:Class
    weight: float = 1.0  # in the sum that is trained on; in a product, the exponent
    range: tuple[float, float] | None = None  # the scores that a product takes as 0 and 1; beyond them it is cut
    args: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the class
    count: int = 1  # actors in its pool
    num_cpus: float = 0.5  # of one actor, by which Ray places it
    num_gpus: float = 0.0  # of one actor; without a reservation it sees no GPU
    threads: int = 1  # torch's, and OpenMP's, of one actor; last bits of scores depend on it
    batch_size: int = 16  # pictures a call
    timeout_s: float = 120.0  # of scoring one order; who takes longer hangs, and is killed


@dataclass
class LearnerConfig:
    algorithm: Algorithm = Algorithm.ddpo_is  # ddpo_is: importance-weighted and clipped; ddpo_sf: score function
    lr: float = 3e-4  # AdamW's learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's decay rates of the gradient's moments
    weight_decay: float = 1e-4  # AdamW's
    optimizer_steps: int = 2  # a batch; ddpo_sf takes one
    train_steps: int | None = None  # of the denoising steps, the first so many; none trains on all
    clip_range: float = 1e-4  # of the ratio of mean-over-dimensions log-probs
    decoupled: bool | None = None  # clip against the policy at the batch's start; null: with max_staleness above 1
    advantage_clip: float = 5.0  # largest absolute advantage, in standard deviations
    max_grad_norm: float = 1.0  # the gradient of an optimizer step is scaled down to this norm
    tracker_size: int = 32  # rewards remembered for each prompt
    tracker_min_count: int = 16  # below it a prompt's advantage uses the whole batch's statistics
    guidance_gradient: GuidanceGradient = GuidanceGradient.full  # conditional leaves out the half without a prompt
    microbatch: int = 64  # (trajectory, timestep) pairs in memory at once; the gradient does not depend on it
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    timeout_s: float = 3600.0  # of training one batch; a learner that takes longer hangs, and is killed
    count: int = 1  # ranks, one actor each, that share a batch and average their gradients
    num_cpus: float = 1.0  # of one rank, by which Ray places it
    num_gpus: float = 1.0  # of one rank; taken as 0, and said so, on a cluster without GPUs
    threads: int = 1  # torch threads of one rank; last bits of results depend on it


@dataclass
class EvaluationConfig:
    """A fixed set of (prompt, seed) pairs, drawn from the run's prompts and seed, scored at version 0, at every
    `every`-th version and at the last."""

    count: int = 128  # (prompt, seed) pairs
    every: int = 10  # versions from one evaluation to the next
    grid: int = 16  # of these pictures, how many a sample grid shows


@dataclass
class CheckpointsConfig:
    keep: int = 2  # recovery points kept besides those that the buffer's rules need


@dataclass
class RayConfig:
    address: str | None = None  # of a running cluster ("auto" finds this machine's); none starts one here
    dashboard: bool = True  # start Ray's dashboard with a cluster started here
    temp_dir: str | None = None  # of a cluster started here


@dataclass
class Config:
    experiment: str = "default"  # the name of the YAML file that was started; set by the first word of the command
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    samplers: WorkerConfig = field(default_factory=WorkerConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    combine: Combine = Combine.sum  # of several rewards: sum (weighted), or product (each scaled by its range)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    ray: RayConfig = field(default_factory=RayConfig)
