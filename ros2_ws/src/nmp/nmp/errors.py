"""The one exception type that users are meant to read."""

from __future__ import annotations


class NmpError(Exception):
    """Bad input or a failed operation, described for the person at the keyboard.

    The text is one line that names the thing that is wrong and says what to do about it. Command-line
    tools print it without a stack trace and exit with code 2; nodes put it into their diagnostics.
    """
