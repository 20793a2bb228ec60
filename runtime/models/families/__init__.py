"""What the networks of a model are to each other."""
