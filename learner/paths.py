"""The doors of objectives and advantages. Imports no torch, so that a misspelt one is answered at once."""

from common.doors import Door

OBJECTIVES = Door(
    built_in={
        "ddpo_is": "learner.objectives.ddpo:ImportanceSampling",
        "ddpo_sf": "learner.objectives.ddpo:ScoreFunction",
        "ddpo_decoupled": "learner.objectives.ddpo:Decoupled",
        "rwr": "learner.objectives.rwr:RewardWeighted",
        "rwr_sparse": "learner.objectives.rwr:RewardWeightedSparse",
        "nft": "learner.objectives.nft:NegativeAware",
        "awm": "learner.objectives.awm:AdvantageWeightedMatching",
    },
    example="my_objective:Mine",
    method="loss(self, policy, batch, pairs, advantages)",
)
ADVANTAGES = Door(
    built_in={
        "per_prompt": "learner.advantages:PerPrompt",
        "by_group": "learner.advantages:ByGroup",
        "by_batch": "learner.advantages:ByBatch",
    },
    example="my_advantage:Mine",
    method="__call__(self, prompts, rewards, groups)",
)
