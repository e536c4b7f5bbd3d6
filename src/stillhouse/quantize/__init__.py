"""Quantization of the student, after training (PTQ) or during training (QAT)."""
