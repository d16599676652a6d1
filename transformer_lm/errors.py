"""The one exception for what a user can cause and mend."""


class UserError(Exception):
    """Something wrong in a config, a file or a command. Its text is one line: what, with which value, what to do."""
