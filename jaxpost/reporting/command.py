"""`jaxpost report`: runs side by side on one page that opens anywhere."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpost.errors import ConfigError, DataError
from jaxpost.methods import METHODS
from jaxpost.options import option
from jaxpost.reporting.page import page
from jaxpost.reporting.runs import Run, names_of, read_run
from jaxpost.writing import check_output_file, write_lines


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `jaxpost report`; words without a flag are runs."""

    runs: list[str] = option([], "Folders of runs (their output_dir).")
    output_file: str = option("report.html", "The page to write.")

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("report needs a run: jaxpost report RUN [RUN ...], each the output_dir of one")
        check_output_file(self.output_file)


def run_report(config: ReportConfig) -> None:
    """Write the page and say where.

    Raises:
        ConfigError: a folder is no run, or the page cannot be written.
        DataError: no run has logged anything yet.
    """
    folders = list({Path(name).resolve(): Path(name) for name in config.runs}.values())
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    if not any(run.series for run in runs):
        which = folders[0] / "metrics.jsonl" if len(runs) == 1 else "metrics.jsonl of these runs"
        raise DataError(f"{which} has no rows; a run writes the first after --logging_steps steps")
    methods = {method.config.__name__: method.name for method in METHODS.values()}
    write_lines(config.output_file, [page(runs, _defaults, methods)])
    for run in runs:
        for note in run.notes:
            print(f"{run.name}: {note}")
    print(f"{config.output_file}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")


def _defaults(run: Run) -> Mapping[str, Any] | None:
    """Of the settings of a run whose config is known."""
    names = {session.config for session in run.sessions}
    for method in METHODS.values():
        if method.config.__name__ in names:
            return dataclasses.asdict(method.config())
    return None
