"""What `d-emo demo` does after it has read its options: load the model, serve the page, until Ctrl-C."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from d_emo.common.output import say

if TYPE_CHECKING:
    from d_emo.pipelines.demo.app import DemoOptions

# Read by Gradio and by the Hub's client when they are imported: nothing is told to anyone, nothing is asked for.
SILENT = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_SSR_MODE": "False"}
LARGEST_UPLOAD = "20mb"


def run(options: "DemoOptions") -> None:
    """Load, serve, wait."""
    os.environ.update(SILENT)
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="d-emo-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what visitors drew and dropped goes with the page
        import gradio  # noqa: F401  before a model is loaded: it may be missing

        from d_emo.pipelines.demo.opening import Source, open_model

        check_address(options.server.host, options.server.port)
        wanted = options.model
        source = Source(name=wanted.model or "", device=wanted.device, dtype=wanted.dtype)
        page = make_page(open_model(source), source, options)
        address = serve(page, options.server.host, options.server.port)
        try:
            say(f"{source.name}: {address} (Ctrl-C ends it)")
            threading.Event().wait()
        except KeyboardInterrupt:
            say("ended")
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let what is in here be left in order, its files deleted, when SIGTERM asks to end or the terminal is closed."""

    def leave(number: int, _: Any) -> NoReturn:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_address(host: str, port: int | None) -> None:
    """Refuse what cannot be listened on, before a model is loaded.

    Raises:
        ValueError: host or port is taken, or is none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        place = f"--host {host}" if port is None else f"--host {host} --port {port}"
        raise ValueError(f"{place}: nothing can listen there (it is taken, or no address of this machine).") from error


def make_page(model: Any, source: Any, options: "DemoOptions") -> Any:
    """The page of a model: Gradio's Blocks."""
    from d_emo.pipelines.demo import pages
    from d_emo.pipelines.demo.drawing import Limits, Studio
    from d_emo.pipelines.demo.opening import draws

    limits = options.limits
    if not draws(model):
        return pages.classifying_page(model, source, limits.max_waiting)
    most = Limits(images=limits.max_images, steps=limits.max_steps, side=limits.max_side)
    return pages.drawing_page(Studio(model, most), source, limits.max_waiting)


def serve(page: Any, host: str, port: int | None) -> str:
    """Start the server, in threads of its own; returns the page's address."""
    from d_emo.pipelines.demo.look import CSS, HEAD, theme

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        inbrowser=False,
        prevent_thread_lock=True,
        footer_links=[],
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
        head=HEAD,
    )
    return address
