"""Draws pictures with a LoRA in whatever diffusers this interpreter has: a program of a user's own.


    python tests/policy/drawing.py JOB.json OUT.npy

JOB: {"pipeline", "lora" (or null), "steps", "guidance", "eta", "pairs": [[prompt, seed], ...]}. Imports nothing of
ours.
"""

import json
import sys

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123  (as a user would write it)
    job = json.load(file)
pipe = StableDiffusionPipeline.from_pretrained(job["pipeline"], safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
if job["lora"] is not None:
    pipe.load_lora_weights(job["lora"])
pictures = [
    pipe(
        prompt,
        num_inference_steps=job["steps"],
        guidance_scale=job["guidance"],
        eta=job["eta"],
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    for prompt, seed in job["pairs"]
]
np.save(sys.argv[2], np.stack([np.asarray(picture) for picture in pictures]))
