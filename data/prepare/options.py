"""The options of the two programs. A module of its own, so that neither is imported to show the other's."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

Flag = tyro.conf.FlagCreatePairsOff[bool]


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Convert a published data set to rows as JSON lines."""

    list_: Annotated[Flag, tyro.conf.arg(name="list")] = False
    """Print all adapters, with the tasks of their rows, source, licence, files and fields, and end."""
    name: str = ""
    """Adapter; --list shows them."""
    in_: Annotated[tuple[str, ...], tyro.conf.arg(name="in")] = ()
    """The set's folder (its training split is read), some of its files, or a saved Hugging Face dataset. Rows of files
    with the same name have ids of their own only if the files are given together."""
    out: str = ""
    """Row file to write, ending in .jsonl."""
    images: str = ""
    """Folder that image paths start from; empty: as the set is published."""
    limit: int = 0
    """Stop after this many rows; 0: all."""
    domain: str = ""
    """Domain of all rows; empty: each row's task."""
    source: str = ""
    """Source of all rows; empty: the set's name."""
    licence: str = ""
    """Licence of all rows; empty: as published."""
    unlabelled: Literal["default", "unsafe", "safe", "reject"] = "default"
    """For spa_vl, pku_saferlhf and safework: what prompts without a safety label become; default: unsafe for spa_vl,
    else reject."""
    max_image_pixels: int = 16_777_216
    """Largest image accepted, in pixels (width x height); a larger one rejects its record."""
    overwrite: bool = False
    """Replace a row file that is there."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Jailbreak augmentation of your own rows: every row, unsafe or benign, meets the same attacks and keeps its label.

    An attack is named by itself, by its kind (cipher, mixing, ...) or by its family (text, image, endpoint).
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.arg(name="in")]
    """Row files (.jsonl, .parquet) or saved Hugging Face datasets, with plain rows."""
    out: str
    """Folder for rows.jsonl and images/, or the rows' own file NAME.jsonl, beside which images/ goes."""
    attacks: tuple[str, ...] = ()
    """Attacks to draw from; empty: all, those of the family endpoint only with --endpoint."""
    holdout: tuple[str, ...] = ()
    """Attacks kept out of the rows and written to heldout.jsonl, for evaluation; name kinds, to keep out all alike."""
    per_row: int | Literal["all"] = 1
    """Different attacks of each row, dealt so that each attack meets unsafe rows in the share of the input."""
    twin_by: str = ""
    r"""Rows whose ids agree in what this regular expression matches (in its first group, if it has one) are twins, and
    meet the same attacks with the same parameters and seed, as '^(.*)-[abc]$'; empty: no twins."""
    endpoint: str = ""
    """Model that the attacks of the family endpoint ask, as URL,MODEL[,key=VARIABLE][,in-flight=N][,timeout=SECONDS]
    [,attempts=N]; key names the environment variable that holds its API key."""
    endpoint_cache: str = ""
    """Folder of its replies, all of which are kept: the same command again asks for none; empty: endpoint_cache beside
    the rows."""
    seed: int = 0
    """Of the dealing and of the attacks."""
    keep_plain: Flag = False
    """Write the plain rows to rows.jsonl too."""
    param: tuple[str, ...] = ()
    """Parameters, as caesar.shift=5, or size=336 for every attack that has one."""
    resize_pixels: int = 1_003_520
    """The model shrinks pictures to this many pixels (width x height); text must be legible after that."""
    drop_illegible: Flag = False
    """Drop a row, and its twins, from an offline attack that cannot take it (text that cannot be drawn legibly, or that
    it leaves as it is), and count it; else an error."""
    ocr: Flag = False
    """Drawn text must be read back by rapidocr-onnxruntime too; about a second a picture."""
    contact_sheet: str = ""
    """PNG with samples of each attack; empty: contact_sheet.png beside the rows."""
    max_image_pixels: int = 16_777_216
    """Largest image accepted, in pixels (width x height), against decompression bombs."""
    overwrite: Flag = False
    """Replace the files of an earlier run."""
