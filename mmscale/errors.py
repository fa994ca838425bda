"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(ValueError):
    """A mistake in what the user gave (a file, a key, a shape): says what is wrong, where, and what to do about it.

    Anything else that is raised is a defect of the program and keeps its traceback.
    """
