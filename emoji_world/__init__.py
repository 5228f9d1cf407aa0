"""Emoji World: the small real diffusion model, its renderer, its prompts and its judge."""
