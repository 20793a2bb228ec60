"""Predicted bytes and seconds."""
