"""A scheme on a model: applied, measured against the unquantized model, reported."""
