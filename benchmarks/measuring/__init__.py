"""The parts of the benchmarks; the script in the folder above names its modules."""
