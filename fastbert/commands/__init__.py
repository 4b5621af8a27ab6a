"""What the command line does, a module a command, and what these share with the project's tests and benchmarks."""
