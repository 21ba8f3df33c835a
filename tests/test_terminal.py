import pytest

from cosmo_rl.data.terminal import printable, shortened


@pytest.mark.parametrize(("text", "shown"), [
    ("safety", "safety"), ("caf\u00e9 \u2603 \u6570\u5b66", "caf\u00e9 \u2603 \u6570\u5b66"),
    ("[/x] [bold]", "[/x] [bold]"), ("", ""),
    ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"), ("a\nb\r\tc", r"a\nb\r\tc"), ("\x9b31m", r"\x9b31m"),
    ("\u202eevil", r"\u202eevil"), ("\u2028", r"\u2028"), ("\udc80", r"\udc80"), ("\x00", r"\x00"), ("\x7f", r"\x7f"),
    ("\U000e0041", r"\U000e0041"), ("\u200b", r"\u200b"),
])
def test_nothing_that_steers_a_terminal_is_left(text, shown):
    assert printable(text) == shown


def test_lines_may_stay_and_a_long_text_loses_its_middle():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert shortened("a" * 1500, 1500) == "a" * 1500
    assert shortened("a" * 1000 + "b" * 5000 + "c" * 500, 1500) == (
        "a" * 1000 + " [... 5,000 characters ...] " + "c" * 500)
