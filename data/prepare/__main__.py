"""Command line: `python -m cosmo_rl.data.prepare {convert,augment} ...`; offline but for `augment --endpoint`."""

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from ..errors import UserError
from ..terminal import printable
from .options import Augment, Convert

PROGRAM = "python -m cosmo_rl.data.prepare"


def main(args: Sequence[str] | None = None) -> int:
    """Parse `args` (sys.argv by default) and run; a user's error is one line on stderr, and exit code 1."""
    options = tyro.cli(
        Annotated[Convert, tyro.conf.subcommand("convert")] | Annotated[Augment, tyro.conf.subcommand("augment")],
        args=args, prog=PROGRAM)
    name = type(options).__name__.lower()
    try:
        if isinstance(options, Convert):
            from .convert import main as convert  # here, as below: each imports what only it needs

            convert(options)
        else:
            from .augment import main as augment

            augment(options)
    except (UserError, OSError) as error:
        print(f"{name}: {printable(str(error), keep=chr(10))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
