"""The one exception that means: the user can mend this."""

from __future__ import annotations


class UserError(Exception):
    """One line for the user: what was wrong, where, and what would be right. The command line exits with code 2."""
