"""EDTR: restoration for a task network by the prior of a latent diffusion model."""
