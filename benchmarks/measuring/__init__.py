"""What the benchmarks run: each module is a part of the script in the folder above that names it."""
