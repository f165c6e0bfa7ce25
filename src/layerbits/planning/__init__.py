"""What a run will take, before it is paid for: memory by mode, seconds a step, what fits this machine."""
