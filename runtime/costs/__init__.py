"""Bytes and seconds."""
