"""What a process needs to run: start-up, signals, other processes, memory, files."""
