"""Make videos from prompts."""
