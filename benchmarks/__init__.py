"""Latency, memory and quality, measured: every result says its command, hardware and versions."""
