"""The diffusion model as a policy: loading, LoRA, one denoising step as a Gaussian, rollout. No Ray in here."""
