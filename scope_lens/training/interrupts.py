"""Ctrl-C and SIGTERM during a run: finish the update, save, and then stop.

Python runs signal handlers between two bytecodes of the main thread, in the middle of an update too. So a handler that
comes during work only notes the signal, and the exception is raised where the work ends. While the run waits for its
caller its state is whole: then the handler saves it and raises there and then. A second signal during work does not
wait.

Several ranks have to stop at the same step, and a signal reaches each at another moment, or one of them alone. There a
handler only notes the signal; where work ends, the ranks agree on whether any of them has noted one.
"""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
TERMINATED = 128 + signal.SIGTERM


class Interrupts:
    """Handlers of SIGINT and SIGTERM; in another thread than the main one they are not installed.

    A signal that the process ignores stays ignored.

    Args:
        save: Called before the exception when a signal comes outside of `working`.
        describe: Text of the KeyboardInterrupt.
        agree: Gives the largest of the ranks' numbers, called by all of them; None for a single process.
    """

    def __init__(
        self,
        save: Callable[[], None],
        describe: Callable[[], str],
        *,
        agree: Callable[[int], int] | None = None,
    ) -> None:
        self._save = save
        self._describe = describe
        self._agree = agree
        self._working = False
        self._noted: int | None = None

    @contextmanager
    def handled(self) -> Generator[None]:
        """Handle both signals until the block ends, and put the earlier handlers back."""
        earlier: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: a handler that was not installed from Python, which could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    earlier[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            # A generator may be closed by another thread than the one that began it, which may not set handlers.
            if threading.current_thread() is threading.main_thread():
                for number, handler in earlier.items():
                    # Bound methods are equal, not identical.
                    if signal.getsignal(number) == self._handle:
                        signal.signal(number, handler)

    @contextmanager
    def working(self) -> Generator[None]:
        """Hold signals back until the block ends, and then raise; on several ranks, where one came on any of them.

        Raises:
            KeyboardInterrupt: SIGINT came.
            SystemExit: SIGTERM came; the code is 143.
        """
        self._working = True
        try:
            yield
        finally:
            self._working = False
        noted = self._noted if self._agree is None else self._agree(self._noted or 0)
        if noted:
            self._stop(noted)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if (self._working or self._agree is not None) and self._noted is None:
            self._noted = number
            return
        if not self._working and self._agree is None:
            self._noted, self._working = number, True
            try:
                self._save()
            finally:
                self._working = False
        self._stop(number)

    def _stop(self, number: int) -> NoReturn:
        self._noted = None
        if number == signal.SIGTERM:
            raise SystemExit(TERMINATED)
        raise KeyboardInterrupt(self._describe())
