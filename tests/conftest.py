"""For every test: a run that is ended by SIGTERM (a time limit, say) ends as by Ctrl-C, so that fixtures clean up."""

from __future__ import annotations

import signal
import threading


def pytest_configure() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # A run in a shell's background has it ignored, programs under test would inherit that, and Ctrl-C do nothing.
        signal.signal(signal.SIGINT, signal.default_int_handler)
