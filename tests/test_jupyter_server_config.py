"""The settings of the Jupyter server: answers of a kernel are not held back, and dead views are not stored."""

import asyncio
from pathlib import Path

import nbformat
import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from traitlets.config import Config, PyFileConfigLoader

ROOT = Path(__file__).parents[1]
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def config() -> Config:
    return PyFileConfigLoader("jupyter_server_config.py", path=str(ROOT / "sft_edu/jupyter_settings")).load_config()


def test_a_connection_sends_at_once(config: Config, monkeypatch: pytest.MonkeyPatch):
    kind = config.ServerApp.kernel_websocket_connection_class
    connection = kind.__new__(kind)
    calls = []
    monkeypatch.setattr(KernelWebsocketHandler, "set_nodelay", lambda self, value: calls.append(value))
    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "connect", lambda self: calls.append("connect"))
    connection.websocket_handler = KernelWebsocketHandler.__new__(KernelWebsocketHandler)
    connection.connect()
    assert calls == [True, "connect"]


def test_a_notebook_is_saved_without_views_that_die_with_their_kernel(config: Config, tmp_path: Path):
    shown = {"text/plain": "StepLab: G=2", VIEW: {"model_id": "1"}}
    outputs = [new_output("execute_result", data=shown), new_output("stream", text="7")]
    notebook = new_notebook(cells=[new_markdown_cell("# A lab"), new_code_cell("lab", outputs=outputs)])
    manager = config.ServerApp.contents_manager_class(root_dir=str(tmp_path))
    asyncio.run(manager.save({"type": "notebook", "content": notebook}, "lesson.ipynb"))
    asyncio.run(manager.save({"type": "file", "format": "text", "content": VIEW}, "notes.txt"))
    saved = nbformat.read(tmp_path / "lesson.ipynb", as_version=4).cells[1].outputs
    assert saved[0].data == {"text/plain": "StepLab: G=2"}
    assert saved[1].text == "7"
    assert (tmp_path / "notes.txt").read_text() == VIEW
