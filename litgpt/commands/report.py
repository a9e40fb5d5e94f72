"""`litgpt report`"""

from pathlib import Path
from typing import Optional

from litgpt.storage.outputs import check_file, exclusive, write_single
from litgpt.train.progress import unbroken
from litgpt.train.resume.folder import REPORT
from litgpt.train.run_report.page import render
from litgpt.train.run_report.recorded import read_run


def main(run: list[Path], out: Optional[Path] = None, overwrite: bool = False) -> None:
    """Write a report of one or more runs: one HTML file that needs no network.

    Shows the settings (of several runs first those that differ), the curves, the data, the scores of litgpt evaluate,
    and what is needed to repeat a run. Parts that a run did not record are left out.

    Args:
        run: Output folders of runs.
        out: The HTML file. Default: report.html in the folder of the run, or out/report.html for several runs.
        overwrite: Replace the file even if litgpt did not write it.
    """
    run = [path for path in run if not path.is_file()] or run  # such as best.yaml in out/sweep/*
    runs = list({found.folder.resolve(): found for found in map(read_run, run)}.values())
    out = out or (runs[0].folder if len(runs) == 1 else Path("out")) / REPORT
    check_file(out, overwrite, "--out")
    text = render(runs)
    with exclusive(out, "--out"):
        write_single(out, text)
    print(f"report  {unbroken(out)} ({out.stat().st_size / 1e3:,.0f} kB)")
