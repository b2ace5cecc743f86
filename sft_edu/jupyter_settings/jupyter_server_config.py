"""Settings of the Jupyter server for the labs: answers of the kernel leave at once.

Tornado lets TCP hold a small message back until the one before is acknowledged (Nagle's algorithm), and a browser
acknowledges up to 40 ms late. A kernel answers a slider with several small messages, so most of a lab's delay was
waiting for nothing.
"""

from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Between page and kernel, without Nagle's algorithm."""

    def connect(self):
        self.websocket_handler.set_nodelay(True)
        return super().connect()


c.ServerApp.kernel_websocket_connection_class = PromptConnection  # noqa: F821 (Jupyter gives `c`)
