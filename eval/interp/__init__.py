"""Auto-interpretability: how well latents can be explained, by a judge and without one."""
