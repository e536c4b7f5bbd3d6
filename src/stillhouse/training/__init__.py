"""Training on top of transformers.Trainer: resumable, distributed, and summed before it divides."""
