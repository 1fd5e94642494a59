"""Objectives: what compares a restored image with its target."""
