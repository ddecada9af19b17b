"""Read and write images and videos as files."""
