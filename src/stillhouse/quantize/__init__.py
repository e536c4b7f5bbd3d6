"""Quantization of the student: after training (PTQ) or during it (QAT)."""
