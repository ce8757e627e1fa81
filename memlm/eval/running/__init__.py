"""Asking a model: the runner, its readers and what they read, prompts, and meters."""
