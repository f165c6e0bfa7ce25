"""Schemes as Hugging Face checkpoints: planned, written, proven, logged."""
