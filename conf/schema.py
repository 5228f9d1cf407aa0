"""The typed configuration: every setting, its type, its default, and what it means.

`conf/default.yaml` holds nothing but the choice of the embedded model's experiment; the defaults live here, beside
their meaning. An experiment (`conf/experiment/*.yaml`) overrides them, the command line overrides the experiment.
What `--help` prints, what is refused and what may change on resume is read from here.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from conf.declaration import (
    AT_LEAST_ONE,
    CPUS,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_SHARE,
    SHARE,
    THREADS,
    Range,
    between,
    free,
    or_null,
    setting,
)

Texts = list[str]  # by a name of its own, because a field called `list` hides the type
STEPS = Range(lambda x: 1 <= x <= 1000, "must lie between 1 and 1000, the steps that models are trained on")
ETA = between(0, 1)
GUIDANCE = Range(lambda x: x >= 1, "must be at least 1, which is no guidance")


class DType(StrEnum):
    """Floating-point formats of weights and stored latents, by their torch names."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"  # for checking numerics; no run takes it, as log-probs are stored in float32


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
    name: str = free("${experiment}", "folder under run.dir; the same name again resumes the run")
    dir: str = free("runs", "where run folders lie: the head's disk or a file system that all hosts share")
    seed: int = setting(0, "every random number of the run follows from it", NOT_NEGATIVE)
    batches: int = free(40, "how many batches to train; may be raised when resuming", AT_LEAST_ONE)
    replay: Texts | None = free(
        None, "folders of runs whose trajectories are trained on, and nothing is sampled: `python launch.py replay`"
    )
    mirror: str | None = free(
        None, "a URI (s3://…, gs://…, file:///…): batches are copied to <name> under it as they come"
    )


@dataclass
class LoraConfig:
    rank: int = setting(8, "of the low-rank update of each adapted projection", between(1, 4096))
    alpha: float = setting(8.0, "the update is scaled by alpha / rank", between(0.001, 1_000_000))
    targets: list[str] = setting(["to_q", "to_k", "to_v", "to_out.0"], "module name endings")
    init_from: str | None = setting(None, "a LoRA saved by diffusers (file or folder) to start from")


@dataclass
class ModelConfig:
    path: str = setting("emoji_world/weights/pipeline", "a diffusers pipeline: folder or hub id")
    family: str | None = setting(
        None, "module:Class of a model family of your own; null: a built-in one, by the class in model_index.json"
    )
    revision: str | None = setting(None, "a hub revision")
    variant: str | None = setting(None, "for example fp16")
    dtype: DType = setting(
        DType.float32, "of the frozen weights and the network's arithmetic; LoRA weights are float32"
    )
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class PromptsConfig:
    """What to finetune on: exactly one of the three."""

    set: str | None = free(None, "a named set, one of those below")
    list: Texts | None = free(None, "the prompts themselves")
    file: str | None = free(None, "a text file, one prompt a line")


@dataclass
class SamplingConfig:
    steps: int = setting(50, "denoising steps, the length T of the MDP's episode", STEPS)
    eta: float = setting(
        1.0, "DDIM's eta; 0 is without noise, which losses on clean pictures take, and no policy gradient", ETA
    )
    guidance: float = setting(5.0, "classifier-free guidance scale, in rollout and in training", GUIDANCE)
    same_noise: bool = setting(False, "a group's pictures start from one noise, and differ by that of their steps")
    latents_dtype: DType = setting(DType.float32, "as stored; log-probs are computed on the rounded latents")


@dataclass
class BufferConfig:
    batch_size: int = setting(64, "trajectories a batch", AT_LEAST_ONE)
    order_size: int = setting(
        16, "trajectories an order, the unit that moves; at least four orders a batch", AT_LEAST_ONE
    )
    group_size: int = setting(
        1, "trajectories of one prompt that are drawn together; 1: each picture's prompt by itself", AT_LEAST_ONE
    )
    max_staleness: int = setting(
        0, "k: data trained at version u are of version >= u - k; 0 is the synchronous algorithm", NOT_NEGATIVE
    )
    keep_batches: int = free(2, "trained batches whose tensors are kept; scalars are kept for ever", AT_LEAST_ONE)
    claim_timeout_s: float = free(
        600.0, "an older claim is offered to another sampler, after twice it the first dies", POSITIVE
    )
    max_failed_share: float = free(0.1, "of a batch's trajectories that may be set aside before the run stops", SHARE)


@dataclass
class WorkerConfig:
    count: int = free(1, "actors; at buffer.max_staleness=0 the data are the same however many", AT_LEAST_ONE)
    num_cpus: float = free(1.0, "of one actor, by which Ray places it", CPUS)
    num_gpus: float = free(1.0, "of one actor; taken as 0, and said so, on a cluster without GPUs", CPUS)
    threads: int = setting(1, "torch threads of one actor; last bits of results depend on it", THREADS)


@dataclass
class RewardConfig:
    path: str = setting("???", "a built-in name (see docs/rewards.md) or module:Class")
    weight: float | None = setting(
        1.0,
        "in the sum that is trained on; in a product, the exponent; null: only measured, in evaluations",
        or_null(between(-1_000_000, 1_000_000)),
    )
    range: tuple[float, float] | None = setting(
        None, "the scores that a product takes as 0 and 1; beyond them it is cut"
    )
    args: dict[str, Any] = setting({}, "keyword arguments of the class")
    count: int = free(1, "actors in its pool", AT_LEAST_ONE)
    num_cpus: float = free(0.5, "of one actor, by which Ray places it", CPUS)
    num_gpus: float = free(0.0, "of one actor; without a reservation it sees no GPU", CPUS)
    threads: int = setting(1, "torch's, and OpenMP's, of one actor; last bits of scores depend on it", THREADS)
    batch_size: int = setting(16, "pictures a call", AT_LEAST_ONE)
    timeout_s: float = free(120.0, "of scoring one order; who takes longer hangs, and is killed", POSITIVE)


@dataclass
class LearnerConfig:
    objective: str | None = setting(
        None,
        "ddpo_is (importance-weighted, clipped), ddpo_sf (score function), ddpo_decoupled (for old data); on clean "
        "pictures rwr, rwr_sparse, nft, awm; or module:Class; null: ddpo_is, and ddpo_decoupled with "
        "buffer.max_staleness above 1",
    )
    objective_args: dict[str, Any] = setting(
        {}, "its keyword arguments, such as step_weight=std of ddpo_*: docs/algorithm.md"
    )
    advantage: str = setting(
        "per_prompt",
        "among a prompt's last pictures (per_prompt), those of a group (by_group), by_batch, or module:Class",
    )
    advantage_args: dict[str, Any] = setting({}, "its keyword arguments, such as std=batch of by_group")
    lr: float = setting(3e-4, "AdamW's learning rate", POSITIVE_SHARE)
    betas: tuple[float, float] = setting((0.9, 0.999), "AdamW's decay rates of the gradient's moments")
    weight_decay: float = setting(1e-4, "AdamW's", NOT_NEGATIVE)
    optimizer_steps: int = setting(2, "a batch; ddpo_sf takes one", AT_LEAST_ONE)
    train_steps: int | None = setting(
        None, "of the denoising steps, the first so many; none trains on all", or_null(AT_LEAST_ONE)
    )
    train_share: float = setting(
        1.0,
        "of a batch's pictures, how many are trained on: those whose advantages are furthest from 0",
        POSITIVE_SHARE,
    )
    clip_range: float = setting(1e-4, "of the ratio of mean-over-dimensions log-probs", POSITIVE)
    advantage_clip: float = setting(5.0, "largest absolute advantage, in standard deviations", POSITIVE)
    max_grad_norm: float = setting(1.0, "the gradient of an optimizer step is scaled down to this norm", POSITIVE)
    kl_weight: float = setting(
        0.0, "of the KL to the base model in the loss, by step and dimension, the scale of log-probs", NOT_NEGATIVE
    )
    kl_target: float | None = setting(
        None, "kl_weight is steered until kl/base_per_dimension is this; null: it stays as it is", or_null(POSITIVE)
    )
    tracker_size: int = setting(32, "rewards remembered for each prompt", AT_LEAST_ONE)
    tracker_min_count: int = setting(
        16, "below it a prompt's advantage uses the whole batch's statistics", AT_LEAST_ONE
    )
    guidance_gradient: GuidanceGradient = setting(
        GuidanceGradient.full, "conditional leaves out the half without a prompt"
    )
    microbatch: int = free(
        64, "(trajectory, timestep) pairs in memory at once; the gradient does not depend on it", AT_LEAST_ONE
    )
    gradient_checkpointing: bool = free(False, "compute activations again in the backward pass: less memory, more time")
    timeout_s: float = free(3600.0, "of training one batch; a learner that takes longer hangs, and is killed", POSITIVE)
    count: int = free(1, "ranks, one actor each, that share a batch and average their gradients", AT_LEAST_ONE)
    num_cpus: float = free(1.0, "of one rank, by which Ray places it", CPUS)
    num_gpus: float = free(1.0, "of one rank; taken as 0, and said so, on a cluster without GPUs", CPUS)
    threads: int = setting(1, "torch threads of one rank; last bits of results depend on it", THREADS)

    def trained_of(self, pictures: int) -> int:
        """How many of a batch's pictures are trained on."""
        return max(1, round(self.train_share * pictures))


@dataclass
class SetSamplingConfig:
    """Where an evaluation set is sampled otherwise than the run; null: as the run."""

    steps: int | None = setting(None, "denoising steps; null: sampling.steps", or_null(STEPS))
    eta: float | None = setting(None, "DDIM's; null: sampling.eta", or_null(ETA))
    guidance: float | None = setting(None, "null: sampling.guidance", or_null(GUIDANCE))


@dataclass
class EvaluationSetConfig:
    """A further fixed set of pairs. What it does not say is as in the set `train`, which every run has."""

    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    count: int | None = setting(None, "(prompt, seed) pairs; null: evaluation.count", or_null(AT_LEAST_ONE))
    every: int | None = setting(None, "versions from one to the next; null: evaluation.every", or_null(AT_LEAST_ONE))
    rewards: Texts | None = setting(None, "names of rewards; null: evaluation.rewards")
    sampling: SetSamplingConfig = field(default_factory=SetSamplingConfig)


@dataclass
class EvaluationConfig:
    """The set `train`: (prompt, seed) pairs drawn from the run's prompts and seed, scored at version 0, at every
    `every`-th version and at the last. And further sets, by name."""

    count: int = setting(128, "(prompt, seed) pairs", AT_LEAST_ONE)
    every: int = setting(10, "versions from one evaluation to the next", AT_LEAST_ONE)
    rewards: Texts | None = setting(None, "names of rewards; null: all, those that nobody trains on as well")
    grid: int = setting(16, "of a set's pictures, how many a sample grid shows", AT_LEAST_ONE)
    scales: list[float] = setting(
        [], "of the LoRA, between 0 and 1, in hundredths, at which half of the pairs are drawn by the last version"
    )
    sets: dict[str, EvaluationSetConfig] = field(default_factory=dict)


class GuardAction(StrEnum):
    """What is done once something that the guard watches has gone wrong."""

    note = "note"
    slow = "slow"
    stop = "stop"


@dataclass
class GuardConfig:
    """What is watched at evaluations: `<set>/<measure>`, such as train/reward or held_out/diversity."""

    action: GuardAction = free(GuardAction.note, "note: only say so; slow: halve the learning rate; stop: end the run")
    best_by: str | None = free(
        None,
        "names the best version, of which lora_best/ is; null: the reward of the further set that is evaluated most "
        "often, or train/reward",
    )
    patience: int | None = free(
        None, "evaluations without a better version, and it acts; null: any number", or_null(AT_LEAST_ONE)
    )
    max_fall: dict[str, float] = free(
        {}, "of a measure from its highest so far, in standard deviations at version 0: beyond it, it acts"
    )
    max_kl: float | None = free(None, "kl/base, in nats a trajectory: beyond it, it acts", or_null(POSITIVE))


@dataclass
class CheckpointsConfig:
    keep: int = free(2, "recovery points kept besides those that the buffer's rules need", AT_LEAST_ONE)


@dataclass
class RayConfig:
    address: str | None = free(None, "of a running cluster ('auto' finds this machine's); none starts one here")
    dashboard: bool = free(True, "start Ray's dashboard with a cluster started here")
    temp_dir: str | None = free(None, "of a cluster started here")


@dataclass
class Config:
    experiment: str = free(
        "default", "the name of the YAML file that was started; set by the first word of the command"
    )
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    samplers: WorkerConfig = field(default_factory=WorkerConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    combine: Combine = setting(Combine.sum, "of several rewards: sum (weighted), or product (each scaled by its range)")
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoints: CheckpointsConfig = field(default_factory=CheckpointsConfig)
    ray: RayConfig = field(default_factory=RayConfig)
