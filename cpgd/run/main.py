"""What train.py calls: one stage on this rank, from the process group to the exit status."""

import logging
import os

import transformers

from cosmo_rl.data.errors import UserError
from cosmo_rl.model.parallel import close_distributed, init_distributed, rank

from ..config import Config
from ..trainer import Trainer
from .ending import fail
from .metrics import Stderr
from .report import finish_report
from .rundir import RunDir

logger = logging.getLogger(__name__)


def main(config: Config) -> int:
    """Run one stage on this rank; returns the exit status. User errors are printed once, without a traceback."""
    logging.basicConfig(level=logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR,
                        format="%(message)s", handlers=[Stderr()])
    transformers.utils.logging.disable_progress_bar()
    try:
        device = init_distributed()
        run = RunDir(config.run_dir, config.stage, config, config.resume)
        if run.finished:
            if rank() == 0:
                logger.info("stage %d is finished in %s", config.stage, run.stage_dir)
                finish_report(run.stage_dir, config, seconds=None)
                if run.changed:
                    logger.warning("not done, as the stage is finished: %s; remove %s and repeat the command to have "
                                   "hf/ and the report made anew", ", ".join(run.changed),
                                   run.stage_dir / "report.json")
        else:
            trainer = Trainer(config, run, device)
            try:
                trainer.run()
            finally:
                trainer.close()
    except (UserError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail("interrupted; repeat the command to go on from the last checkpoint", status=130)
    close_distributed()
    return 0
