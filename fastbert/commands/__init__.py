"""The commands of the command line, one module each, and helpers that the project's tests and benchmarks share."""
