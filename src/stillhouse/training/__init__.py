"""The trainer on top of transformers.Trainer."""
