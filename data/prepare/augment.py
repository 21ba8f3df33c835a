"""Rows under jailbreak attacks, as a folder or file of rows with their images: `augment --in rows.jsonl --out DIR`.

rows.jsonl, heldout.jsonl, images/ and the contact sheet appear together or not at all. Each row is followed by its
attacked versions, by family, kind and name of the attack. An image that no attack touched is copied byte for byte.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

from cosmo_rl.cpgd.judges.endpoint_spec import Server, parse_server

from ..dataset import load_rows
from ..errors import UserError
from ..schema import Row, parse_row
from .jailbreak.asking import open_model, settle
from .jailbreak.assign import AttackerReplies, Assignment, Outcome, assign, attack_all, is_unsafe, twin_keys
from .jailbreak.carriers import Carriers
from .jailbreak.contact_sheet import ContactSheet
from .jailbreak.registry import FAMILIES, OFFLINE, Attack, find, ordered
from .jailbreak.render import rapidocr
from .options import Augment
from .writer import Reasons, row_writer
