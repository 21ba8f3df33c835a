"""What a terminal may be shown of a text that a user's data holds."""


def printable(text: str, *, keep: str = "") -> str:
    """The text with control characters, half characters and marks that turn the direction written as escapes.

    A domain may be named "\\x1b[2J", which would clear the screen, or hold a line break.

    Args:
        keep: characters that stay as they are: "\\n" where lines are shown as lines.
    """
    return text if text.isprintable() else "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, most: int) -> str:
    """Of a text longer than `most` characters so many of its head and tail, and how many are left out."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]} [... {len(text) - head - tail:,} characters ...] {text[-tail:]}"
