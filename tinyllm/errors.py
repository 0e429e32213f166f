"""The one error that is the user's to mend."""


class InputError(ValueError):
    """Something given to us is unusable: a file, a folder, an option, a prompt.

    The message is one line that names the thing and the way out. Scripts print it and leave with exit
    code 2; no traceback, because the program is not at fault.
    """
