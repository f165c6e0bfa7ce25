"""How quantized weights lie in files: a module for each way to pack their values."""
