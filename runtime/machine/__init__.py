"""The machine: this one, or a profile from profiles/."""
