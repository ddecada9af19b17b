"""Write files atomically; hash, name and find files."""
