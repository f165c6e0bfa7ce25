"""The stages of a sensitivity run: what it works on, its plan, the pass over the model, its files."""
