"""Diffusion models: noise schedules, denoisers, samplers, and the prior that ships with the package."""
