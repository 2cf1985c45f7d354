"""Code that tests of the package and of the benchmarks share: models, batches, comparisons."""
