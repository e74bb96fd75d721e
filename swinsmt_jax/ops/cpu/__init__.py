"""Forms of operations that only a CPU wants: XLA compiles the plain ones badly."""
