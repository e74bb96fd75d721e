"""Forms of operations for GPUs."""
