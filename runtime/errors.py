"""The one exception that means: what was asked cannot be done as asked, and here is the cure."""


class TightfitError(Exception):
    """Bad input or a bad file. Its text is one line a user can act on; the command line prints it and exits with 2."""
