"""Which way to run a request, and what each would take."""
