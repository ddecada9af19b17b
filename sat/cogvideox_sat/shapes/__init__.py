"""The data set of moving shapes, and the judge for the tiny model."""
