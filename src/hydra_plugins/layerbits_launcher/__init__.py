"""LayerBits' launcher, where Hydra looks for plugins."""
