"""A JupyterLab server and a Chromium page for the tests of this folder."""

import os
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from .lab_page import ROOT, SECONDS, LabPage, Server, chromium_page, find_chromium, lab_server

expect.set_options(timeout=15 * SECONDS)  # where tests share the machine, a kernel may take its time


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with lab_server(ROOT / "notebooks") as running:
        yield running


# Package scope, not session: playwright leaves an event loop running in this thread while it is open,
# and the notebook tests that follow need to start their own.
@pytest.fixture(scope="package")
def lab(server: Server) -> Iterator[LabPage]:
    if find_chromium() is None:
        complain = pytest.fail if os.environ.get("CI") else pytest.skip
        complain("Chromium is missing; on Debian and Ubuntu: sudo apt-get install chromium")
    with chromium_page() as page:
        yield LabPage(page, server)
