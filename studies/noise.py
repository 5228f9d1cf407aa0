"""What decides the reward of a picture, apart from its prompt: its first noise, or the noise of its steps?

    python -m studies.noise compressibility alignment counting

Of the base model. `first noise` is its share of the variance among pictures of one prompt: no action decides it, so to
a policy gradient it is noise, unless pictures of one start are compared (sampling.same_noise). `mirrored` is the
correlation c of two pictures of one start whose steps have opposite noise. What the reward has in common at z and -z
says nothing of the gradient and cancels in such a pair, so its gradient has 1 - c of the variance that two others have.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.commands import command
from common.errors import UserError
from common.precision import exact_float32
from conf.evaluations import trained_rewards
from conf.load import load
from conf.prompts import resolve_prompts
from policy.policy import Policy
from rewards.registry import resolve
from studies.curves import table

PROMPTS, STARTS, PATHS = 24, 4, 4  # of each prompt, and of each start


@torch.no_grad()
def pictures(policy: Policy, prompt: str, first: Tensor, noise: Tensor) -> np.ndarray:
    """uint8 [B,H,W,3]. first: [B,C,H,W]; noise: [T,B,C,H,W] of the steps."""
    x, conditioning = first, policy.encode([prompt] * len(first))
    for i in range(policy.num_steps):
        mean, std = policy.gaussian(x, torch.full((len(first),), i), conditioning)
        x = mean + std * noise[i]
    return policy.decode(x)


def scores(experiment: str) -> np.ndarray:
    """[prompts, starts, paths, 2]: the last axis is a path and the one with opposite noise in its steps."""
    config = load([experiment])
    name, *others = trained_rewards(config)
    if others:
        raise UserError(f"{experiment} is trained on several rewards ({name}, {', '.join(others)}): name one with one")
    reward = resolve(name, config.rewards[name].path, config.rewards[name].args)
    policy = Policy.load(config.model, config.sampling, config.run.seed, "cpu", trainable=False)
    generator = torch.Generator().manual_seed(config.run.seed)
    found = []
    for prompt in resolve_prompts(config.prompts)[:PROMPTS]:
        first = torch.randn(STARTS, 1, *policy.latent_shape, generator=generator)
        first = first.expand(-1, PATHS, -1, -1, -1).flatten(0, 1)
        noise = torch.randn(policy.num_steps, *first.shape, generator=generator)
        both = [pictures(policy, prompt, first, sign * noise) for sign in (1, -1)]
        found.append(np.stack([reward(images, [prompt] * len(first)).scores for images in both], axis=-1))
    return np.stack(found).reshape(len(found), STARTS, PATHS, 2).astype(np.float64)


def parts(found: np.ndarray) -> tuple[float, float]:
    """The first noise's share of the variance, and the correlation of mirrored paths, both without bias from the few
    pictures that there are: by the analysis of variance of one random factor."""
    path = found[..., 0]
    by_steps = path.var(axis=2, ddof=1).mean()
    by_start = path.mean(axis=2).var(axis=1, ddof=1).mean() - by_steps / PATHS
    mirrored = 1 - ((found[..., 0] - found[..., 1]) ** 2).mean() / 2 / by_steps
    return by_start / (by_start + by_steps), mirrored


@command("studies.noise")
def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="studies.noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+")
    exact_float32()
    torch.set_num_threads(1)  # last bits depend on it
    rows = {name: [f"{part:.2f}" for part in parts(scores(name))] for name in parser.parse_args(arguments).experiments}
    print(table(("experiment", "first noise", "mirrored"), rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
