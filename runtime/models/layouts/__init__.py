"""How a model lies in its files."""
