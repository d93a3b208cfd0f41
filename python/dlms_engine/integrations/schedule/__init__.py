"""What ``DLMSScheduler`` is made of: noise model, times, rows and running state.

No module here imports diffusers: a scheduler config is a mapping.
"""
