"""The page about a run, written when all that it tells of is in the run folder."""

from __future__ import annotations

import logging

from heretic_ds.foreign.disk import write_atomically
from heretic_ds.report.html.page import page
from heretic_ds.run_folder import RESULTS_NAME
from heretic_ds.stages.facts import model_title
from heretic_ds.stages.opening import Run

log = logging.getLogger(__name__)


def write_report(run: Run) -> None:
    """Write ``report.html`` from what the run folder holds; nothing where there are no results of a search yet.

    It comes after everything else, and nothing depends on it: an error is told and forgotten.
    """
    folder = run.folder
    if folder is None or not run.settings.report.html or not folder.results.is_file():
        return
    try:
        write_atomically(folder.report, page(folder.path, run.scorer, model_title(run.job)))
    except Exception as error:
        log.warning("%s was not written: %s: %s", folder.report, type(error).__name__, " ".join(str(error).split()))
        log.debug("while %s was read", RESULTS_NAME, exc_info=True)
    else:
        log.info("the report is %s", folder.report)
