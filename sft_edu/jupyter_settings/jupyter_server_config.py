"""Settings of the Jupyter server for the labs.

Answers of the kernel leave at once. Tornado lets TCP hold a small message back until the one before is acknowledged
(Nagle's algorithm), and a browser acknowledges up to 40 ms late. A kernel answers a slider with several small messages,
so most of a lab's delay was waiting for nothing.

A notebook is saved without the views of its widgets. They die with their kernel, and a notebook that is opened again
would show an error in the place of each; without the view, Jupyter shows the widget's text or picture.
"""

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection


class PromptConnection(ZMQChannelsWebsocketConnection):
    """Between page and kernel, without Nagle's algorithm."""

    def connect(self):
        self.websocket_handler.set_nodelay(True)
        return super().connect()


class FilesWithoutViews(AsyncLargeFileManager):
    """The files of the folder; what is dropped here is still on the page."""

    def run_pre_save_hooks(self, model, path, **others):
        super().run_pre_save_hooks(model, path, **others)
        cells = model["content"]["cells"] if model["type"] == "notebook" else []
        for output in (output for cell in cells for output in cell.get("outputs", [])):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)


# Jupyter gives `c`.
c.ServerApp.kernel_websocket_connection_class = PromptConnection  # noqa: F821
c.ServerApp.contents_manager_class = FilesWithoutViews  # noqa: F821
