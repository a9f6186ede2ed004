"""A polite end: on SIGTERM or Ctrl-C finish the step, save, leave."""

import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether the run was asked to stop, and by what. From the moment it is made, SIGTERM and the first Ctrl-C are only
    noted; a second Ctrl-C interrupts. `restore` gives both their effect from before."""

    def __init__(self):
        self.reason: str | None = None
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number, _frame):
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self):
        """Give the signals their effect from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_signals(_worker: int = 0):
    """In a loader process: leave it to the main process to stop, which needs its batches until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
