"""Forms of operations for CPUs, where XLA compiles the plain ones badly."""
