"""Parts of `benchmarks/train_throughput.py`; the workers import them inside the environments of the peers."""
