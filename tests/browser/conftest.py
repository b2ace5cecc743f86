"""A JupyterLab server and a Chromium page for the tests of this folder."""

import os
from collections.abc import Iterator

import pytest

from .lab_page import ROOT, LabPage, Server, chromium_page, find_chromium, lab_server


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
