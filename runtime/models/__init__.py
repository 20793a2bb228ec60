"""What a model is, read from configs and headers."""
