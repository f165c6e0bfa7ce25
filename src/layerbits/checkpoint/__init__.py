"""Exported checkpoints: what labels mean, a reader of our own, the proof that an export is what was scored."""
