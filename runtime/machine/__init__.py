"""What a machine is: this one, or one of profiles/."""
