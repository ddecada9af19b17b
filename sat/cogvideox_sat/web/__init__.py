"""Browser page for making videos, following training and looking at data sets."""
