"""What scripts/benchmark.py runs: training, one layer, generation, placement."""
