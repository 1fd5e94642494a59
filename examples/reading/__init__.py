"""Restoration for readers of text that nobody may retrain: rendered words, a fixed recognizer, and a judge."""
