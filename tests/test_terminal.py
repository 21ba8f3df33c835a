import pytest

from cosmo_rl.data.terminal import printable


@pytest.mark.parametrize(("text", "shown"), [
    ("safety", "safety"), ("caf\u00e9 \u2603 \u6570\u5b66", "caf\u00e9 \u2603 \u6570\u5b66"),
    ("[/x] [bold]", "[/x] [bold]"), ("", ""),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"), ("a\nb\r\tc", r"a\nb\r\tc"), ("\x9b31m", r"\x9b31m"),
    ("\u202eevil", r"\u202eevil"), ("\u2028", r"\u2028"), ("\udc80", r"\udc80"), ("\x00", r"\x00"), ("\x7f", r"\x7f"),
    ("\U000e0041", r"\U000e0041"), ("\u200b", r"\u200b"),
])
def test_nothing_that_steers_a_terminal_is_left(text, shown):
    assert printable(text) == shown
