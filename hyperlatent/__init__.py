"""Plain language chooses the weights of a network."""

__version__ = "0.1.0"
