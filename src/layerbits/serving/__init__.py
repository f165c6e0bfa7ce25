"""What a runtime would serve of an exported checkpoint."""
