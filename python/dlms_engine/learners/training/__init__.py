"""What the learners share: trainer, losses, validation, checkpoints."""
