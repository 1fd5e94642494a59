"""Networks that the recipes train: restorers, a small latent diffusion model."""
