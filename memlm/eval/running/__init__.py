"""A model is asked: the runner, its readers and what they read, prompts, the log."""
