"""ModelOpt's own language: its recipes in, schemes as recipes out, its search states as results."""
