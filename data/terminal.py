"""What a terminal may be shown of a text that a user's data holds."""


def printable(text: str) -> str:
    """The text with control characters, half characters and marks that turn the direction written as escapes.

    A domain may be named "\\x1b[2J", which would clear the screen, or hold a line break.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
