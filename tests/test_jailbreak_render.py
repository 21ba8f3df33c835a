"""Drawn text: it is laid out in the largest font that fits, and the check finds what a reader could not read."""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import importlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from cosmo_rl.data.prepare.jailbreak import render
from cosmo_rl.data.prepare.jailbreak.registry import Unfit
from cosmo_rl.data.prepare.jailbreak.render import Ink, check, ink, layout, paint

SIZE = (400, 300)
LOOSE = {"resize_pixels": 10**6, "min_glyph": 4.0, "min_contrast": 1.0}


def draw(text, *, size=SIZE, colour=(0, 0, 0), ground="white", largest=40):
    """(before, after, ink) of `text` in one colour on one ground."""
    before = Image.new("RGB", size, ground)
    drawn = ink(layout(text, size[0] - 40, size[1] - 40, largest=largest, x_height=4), size, (20, 20))
    return before, paint(before, drawn, Image.new("RGB", size, colour)), drawn


@pytest.mark.parametrize(("colour", "ground", "ratio"), [
    ("black", "white", 21.0), ("#767676", "white", 4.54), ("#949494", "white", 3.03), ("white", "#0000ff", 8.59),
])
def test_contrast_is_that_of_wcag(colour, ground, ratio):
    """Against the published values of well-known pairs (#767676 is the lightest grey of level AA)."""
    assert check(*draw("throw the cup", colour=colour, ground=ground), **LOOSE) == pytest.approx(ratio, abs=0.01)


def test_contrast_below_the_limit():
    pictures = draw("throw the cup", colour="#949494")
    assert check(*pictures, **{**LOOSE, "min_contrast": 3.0}) > 3
    with pytest.raises(Unfit, match=r"contrast of a drawn word is 3\.03, under 4\.5; .*--drop-illegible"):
        check(*pictures, **{**LOOSE, "min_contrast": 4.5})


def test_one_lost_word_among_many_is_found():
    before, after, drawn = draw("throw the cup over the green garden wall please")
    box = drawn.words[2]
    after.paste(before.crop(box), box[:2])
    with pytest.raises(Unfit, match=r"is 1\.00"):
        check(before, after, drawn, **{**LOOSE, "min_contrast": 1.2})


def test_glyph_height_counts_after_the_models_resize():
    before, after, drawn = draw("throw the cup", largest=40)
    x = drawn.x_height
    assert 19 <= x <= 23  # about half of the font size
    check(before, after, drawn, resize_pixels=400 * 300, min_glyph=x, min_contrast=1.0)
    with pytest.raises(Unfit, match=rf"x is {x / 2:.1f} pixels high where the model sees it, under {x}"):
        check(before, after, drawn, resize_pixels=200 * 150, min_glyph=x, min_contrast=1.0)
    with pytest.raises(Unfit, match="pixels high"):  # a part of a picture that is four times as large
        check(before, after, drawn, resize_pixels=400 * 300, min_glyph=x, min_contrast=1.0, whole=(800, 600))


def test_hairlines_that_the_resize_swallows_are_not_ink():
    before = Image.new("RGB", (1000, 1000), "white")
    mask = Image.new("L", before.size)
    ImageDraw.Draw(mask).line((100, 500, 900, 500), fill=255, width=1)
    drawn = Ink(mask, ((100, 480, 900, 520),), (480, 520), x_height=40, text="-")
    after = Image.composite(Image.new("RGB", before.size), before, mask)
    assert check(before, after, drawn, **LOOSE) == pytest.approx(21)
    with pytest.raises(Unfit, match="contrast"):
        check(before, after, drawn, resize_pixels=100 * 100, min_glyph=1.0, min_contrast=1.5)


@pytest.mark.parametrize("side", ["left", "top", "right", "bottom", "none"])
def test_cut_off_ink_is_found(side):
    mask = Image.new("L", SIZE)
    box = {"left": (0, 50, 30, 60), "top": (50, 0, 80, 9), "right": (370, 50, 399, 60), "bottom": (50, 280, 80, 299)}
    if side != "none":
        ImageDraw.Draw(mask).rectangle(box[side], fill=255)
    white = Image.new("RGB", SIZE, "white")
    with pytest.raises(Unfit, match="missing, or cut off"):
        check(white, white, Ink(mask, (), (), 20, ""), **LOOSE)


@pytest.mark.parametrize("origin", [(-3, 20), (20, -9), (330, 20), (20, 280)])
def test_a_line_beyond_the_picture_is_found_before_it_is_drawn(origin):
    lines = layout("throw the cup", 360, 260, largest=30, x_height=4)
    with pytest.raises(Unfit, match="beyond a picture of 400 x 300"):
        ink(lines, SIZE, origin)


def test_the_largest_font_that_fits():
    heights = []
    for number in (1, 20, 60):
        lines = layout(" ".join(["throw the cup"] * number), 300, 200, largest=60, x_height=4)
        heights.append(lines.x_height)
        assert lines.height <= 200 and all(lines.font.getlength(line) <= 300 for line in lines.text)
        assert " ".join(lines.text) == " ".join(["throw the cup"] * number)
        larger = ImageFont.load_default(round(lines.font.size / render.STEP) + 1)
        if number > 1:  # more than one step larger does not fit
            rewrapped = render.wrap(" ".join(lines.text), 300, larger, breaks=False)
            assert len(rewrapped) * round(larger.size * render.LINE_HEIGHT) > 200
    assert heights == sorted(heights, reverse=True) and heights[0] > 2 * heights[2]


def test_newlines_stay_and_long_words_break_only_when_they_must():
    assert layout("one cup\n\ntwo cups", 300, 200, largest=20, x_height=4).text == ("one cup", "two cups")
    word = "teapot" * 8
    whole = layout(f"a {word}", 300, 200, largest=60, x_height=4)
    assert whole.text[-1].endswith(word) and whole.font.size < 20  # a smaller font keeps it whole
    broken = layout(f"a {word * 4}", 300, 200, largest=20, x_height=9).text
    assert len(broken) > 2 and "".join(broken) == f"a{word * 4}"


def test_too_much_text():
    with pytest.raises(Unfit, match=r"1399 characters do not fit into 200 x 100 pixels with an x of at least 8\.0"):
        layout(" ".join(["throw the cup"] * 100), 200, 100, largest=30, x_height=8)
    with pytest.raises(Unfit, match="no text to draw"):
        layout(" \n\u200b", 200, 100, largest=30, x_height=8)


def test_every_character_is_drawn_or_refused():
    assert render.font_for("Throw the cup! 'now' {1} ~#", "") == ""
    accented = layout("caf\u00e9 \u201ccup\u201d \u0447\u0430\u0448\u043a\u0430", 300, 200, largest=30, x_height=4)
    assert accented.font.getname()[0] == "DejaVu Sans"
    box = ImageFont.load_default(30).getmask("\U0010fffe")
    assert ImageFont.load_default(30).getmask("\u00e9").getbbox() == box.getbbox()  # why the built-in font will not do
    for text, message in (("\u4e00 cup", r"CJK UNIFIED IDEOGRAPH-4E00 \(U\+4E00\).*--param font=FILE"),
                          ("cup \U0001f375", r"U\+1F375"), ("\u0643\u0648\u0628", "ARABIC LETTER KAF.*shaping"),
                          ("cup \x07", r"U\+0007")):
        with pytest.raises(Unfit, match=message):
            layout(text, 300, 200, largest=30, x_height=4)
    # A decomposed accent is composed first; a soft hyphen shows as nothing and is left out.
    assert layout("cafe\u0301 sau\u00adcer", 300, 200, largest=30, x_height=4).text == ("caf\u00e9 saucer",)


def test_without_matplotlib_its_font_is_named(monkeypatch):
    monkeypatch.setattr(render, "dejavu_sans", lambda: "")
    with pytest.raises(Unfit, match=r"no LATIN SMALL LETTER E .*pip install matplotlib, which brings DejaVu"):
        layout("caf\u00e9", 300, 200, largest=30, x_height=4)


def test_users_font(tmp_path):
    path = render.dejavu_sans().replace("DejaVuSans.ttf", "DejaVuSerif.ttf")
    assert layout("cup", 300, 200, largest=30, x_height=4, font=path).font.getname()[0] == "DejaVu Serif"
    (tmp_path / "no.ttf").write_text("no font")
    for bad in (tmp_path / "no.ttf", tmp_path / "gone.ttf"):
        with pytest.raises(ValueError, match=r"the font .* cannot be read"):
            layout("cup", 300, 200, largest=30, x_height=4, font=str(bad))


@pytest.mark.parametrize("opacity", [0.3, 1.0])
def test_contrasting_ink_takes_the_better_of_black_and_white(opacity):
    rng = np.random.default_rng(0)
    grounds = rng.integers(0, 256, (40, 25, 3), dtype=np.uint8)
    chosen = np.asarray(render.contrasting(Image.fromarray(grounds), opacity))
    ratios = {}
    for value in (0, 255):
        over = np.rint(opacity * value + (1 - opacity) * grounds).astype(np.uint8)
        a, b = render._luminance(grounds), render._luminance(over)
        ratios[value] = (np.maximum(a, b) + 0.05) / (np.minimum(a, b) + 0.05)
    best = np.where(ratios[255] > ratios[0], 255, 0)
    assert (chosen == best[..., None]).mean() > 0.999  # ties may fall either way
    assert np.maximum(ratios[0], ratios[255]).min() > 1.45
    assert 0 < (chosen == 255).mean() < 1


def test_opacity():
    before, _, drawn = draw("throw the cup", ground="#808080")
    faint = np.asarray(paint(before, drawn, Image.new("RGB", SIZE, "white"), 0.25)).astype(int)
    full = np.asarray(drawn.mask) == 255
    assert full.sum() > 500 and (abs(faint[full] - (128 + 127 * 0.25)) <= 1).all()
    assert (faint[np.asarray(drawn.mask) == 0] == 128).all()


def test_ocr_must_read_it_back():
    pictures = draw("throw the cup")
    check(*pictures, **LOOSE, read=lambda picture: "Throw  the\ncup.")
    with pytest.raises(Unfit, match=r"OCR reads 45% of the drawn text back, under 70%"):
        check(*pictures, **LOOSE, read=lambda picture: "throw")


def test_ocr_is_optional(monkeypatch):
    real = importlib.import_module

    def absent(name, *args):
        if name.startswith("rapidocr"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match="pip install rapidocr-onnxruntime"):
        render.rapidocr()
