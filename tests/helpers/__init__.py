"""What tests of the product and of the benchmarks share: models, batches, comparisons."""
