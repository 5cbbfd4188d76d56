"""A plugin of pytest for gpu_day.py: it writes at once how each test ended, and goes on where others did not get.

With --rehearse the tests of a GPU run without one, on the tests' emulation and Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from gpu_work import AGAIN, is_usable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, required=True, help="the file for a line of JSON at each start and end")
    parser.addoption("--done", type=Path, required=True, help="a file of the tests to leave out, one a line")
    parser.addoption(
        "--without", action="append", default=[], metavar="WORD", help="leave out what has it as parameter"
    )
    parser.addoption("--rehearse", action="store_true")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report(config))


class Report:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist: the one that it reports to writes

    def say(self, **line: Any) -> None:
        if not self.is_worker:
            with self.config.getoption("report").open("a") as file:
                file.write(json.dumps(line) + "\n")

    @pytest.hookimpl(trylast=True)  # after conftest.py, which skips tests of a GPU
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = set(self.config.getoption("done").read_text().splitlines())
        without = set(self.config.getoption("without"))
        is_left = lambda item: item.nodeid not in done and not without.intersection(re.split(r"[\[\]-]", item.nodeid))
        items[:] = [item for item in items if is_left(item)]
        if self.config.getoption("rehearse"):
            for item in items:
                item.module.DEVICE = "cpu"
                item.own_markers[:] = [
                    mark for mark in item.own_markers if mark.kwargs.get("reason") != "no CUDA device"
                ]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(start=nodeid)

    @pytest.hookimpl(trylast=True)  # a worker's report is on its way
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            found = {"item": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            self.say(**found, **({} if report.passed else {"reason": _reason(report)}))
        is_here = self.is_worker or not self.config.getoption("numprocesses", None)
        if report.failed and is_here and not self.config.getoption("rehearse") and not is_usable():
            os._exit(AGAIN)  # every later test of this process would fail


def _reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line and reason
        text = report.longrepr[2]
    else:
        text = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
    return re.sub(r"\s+", " ", text)[:300]
