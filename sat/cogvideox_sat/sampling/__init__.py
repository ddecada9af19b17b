"""Making videos from prompts."""
