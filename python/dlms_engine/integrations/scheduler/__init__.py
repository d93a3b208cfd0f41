"""What ``DLMSScheduler`` is made of: noise model, times, rows, running state, whole-loop runs."""
