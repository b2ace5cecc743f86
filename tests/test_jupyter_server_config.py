"""The setting of the Jupyter server: answers of a kernel are not held back."""

from pathlib import Path

import pytest
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from traitlets.config import PyFileConfigLoader

ROOT = Path(__file__).parents[1]


def test_a_connection_sends_at_once(monkeypatch: pytest.MonkeyPatch):
    config = PyFileConfigLoader("jupyter_server_config.py", path=str(ROOT / "sft_edu/jupyter_settings")).load_config()
    kind = config.ServerApp.kernel_websocket_connection_class
    connection = kind.__new__(kind)
    calls = []
    monkeypatch.setattr(KernelWebsocketHandler, "set_nodelay", lambda self, value: calls.append(value))
    monkeypatch.setattr(ZMQChannelsWebsocketConnection, "connect", lambda self: calls.append("connect"))
    connection.websocket_handler = KernelWebsocketHandler.__new__(KernelWebsocketHandler)
    connection.connect()
    assert calls == [True, "connect"]
