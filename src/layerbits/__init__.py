"""LayerBits: which layers of a language model can afford fewer bits, and how sure we are."""

__version__ = "0.1.0"
