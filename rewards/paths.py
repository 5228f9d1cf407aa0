"""The door of rewards. Imports no torch, so that a misspelt one is answered at once."""

from common.doors import Door

REWARDS = Door(
    built_in={
        "aesthetic": "rewards.aesthetic:Aesthetic",
        "caption": "rewards.caption:CaptionRecall",
        "clip_score": "rewards.clip_score:ClipScore",
        "compressibility": "rewards.jpeg:JpegCompressibility",
        "incompressibility": "rewards.jpeg:JpegIncompressibility",
        "vqa": "rewards.vqa:QuestionAnswering",
    },
    example="my_rewards:Brightness",
    method="__call__(self, images, prompts)",
)
