"""Hundreds of requests: a table of them, a ledger of what became of each, and who paints them."""
