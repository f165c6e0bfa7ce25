"""What a run found, as plain typed data with its statistics. Imports nothing heavy."""
