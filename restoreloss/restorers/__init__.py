"""EDTR and UniRestore as modules, wired onto latent diffusion models."""
