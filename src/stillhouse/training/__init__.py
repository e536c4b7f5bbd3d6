"""Training on top of transformers.Trainer: resumable, distributed, with losses summed per token."""
