"""Command line of the trainer: `torchrun train.py --stage 2 [--preset tiny] [--objective.drift-coef 0.02 ...]`.

With --dry-run all of it is checked, and nothing trained; see cpgd/run/dryrun.py.
"""

import io
import os
import signal
import sys

# Idle OpenMP threads spin by default; beside any other load, small operators then take up to 100 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The checkout holds folders named kernels/ and data/: off the path, or other packages would find them by these names.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]
if int(os.environ.get("RANK", "0")):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # rank 0 tells of a Ctrl-C, the others just end
if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a domain's name may be more than the terminal takes

try:
    from cosmo_rl.cpgd.run.process import die_with_parent

    die_with_parent()  # before torch is imported, which takes seconds
    from torch.distributed.elastic.multiprocessing.errors import record

    from cosmo_rl.cpgd.run.recipes import parse_command
except KeyboardInterrupt:
    sys.exit(130)
except ModuleNotFoundError as error:
    if error.name != "cosmo_rl":
        raise
    sys.exit("cosmo_rl is not installed: run `make demo`, or `pip install -e .` in this folder")


@record  # a bug's traceback: torchrun shows it below its own
def run() -> int:
    command = parse_command(sys.argv[1:])
    try:  # not before: what is wrong with the options is said at once
        if command.dry_run:
            from cosmo_rl.cpgd.run.dryrun import dry_run as start
        else:
            from cosmo_rl.cpgd.run.main import main as start
    except KeyboardInterrupt:
        return 130
    return start(command.config)


if __name__ == "__main__":
    sys.exit(run())
