"""What the tests and the benchmarks share: numbers of the official code to compare with."""
