"""The data set of moving shapes and what the tiny model is judged by."""
