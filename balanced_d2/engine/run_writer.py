"""What the writers for MLflow and Weights & Biases have in common: one run for one training."""

import logging
import os
import sys
from typing import Any, Callable, Dict, Tuple

from detectron2.utils.events import EventWriter, get_event_storage

from balanced_d2.engine.after_evaluation import StopEarly

logger = logging.getLogger(__name__)

Scalars = Dict[str, Tuple[float, int]]
"""Value and iteration of each, by its name."""


class RunWriter(EventWriter):
    """Writes all scalars of a training to a run of a tracker, which a resumed training continues.

    If that fails, there is one warning, and training goes on without it. The run begins when there
    is something to write, since only then it is known whether the training is resumed.

    Subclasses implement ``start_run``, ``log`` and ``end_run``, which may raise anything.

    Args:
        folder: ``OUTPUT_DIR``, where the id of the run is kept.
        is_resumed: whether the training continues, and so its run.
        window_size: the number of iterations that scalars are smoothed over, as in TensorBoard.
    """

    tracker: str
    """The name of the tracker, for messages."""
    run_file: str
    """The name of the file with the id of the run."""

    def __init__(
        self, folder: str, is_resumed: Callable[[], bool] = lambda: False, window_size: int = 20
    ):
        self.folder = folder
        self._is_resumed = is_resumed
        self._window_size = window_size
        self._last_write = -1
        self._has_begun = False
        self._has_failed = False

    def start_run(self, run_id: str) -> str:
        """Begin a run.

        Args:
            run_id: of the run to continue; "" for a new one.

        Returns:
            The id of the run.
        """
        raise NotImplementedError

    def log(self, scalars: Scalars) -> None:
        """Write scalars to the run."""
        raise NotImplementedError

    def end_run(self, is_complete: bool) -> None:
        """End the run; it has failed if the training is not complete."""
        raise NotImplementedError

    def write(self):
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = {name: value for name, value in latest.items() if value[1] > self._last_write}
        if not new:
            return
        self._last_write = max(iteration for _, iteration in new.values())
        if not self._has_begun:
            self._has_begun = True
            self.attempt(self._begin)
        self.attempt(self.log, new)

    def close(self):
        if not self._has_begun:
            return
        error = sys.exc_info()[1]
        self.attempt(self.end_run, error is None or isinstance(error, StopEarly))

    def attempt(self, function: Callable, *args: Any) -> None:
        """Call a function, unless something has failed before."""
        if self._has_failed:
            return
        try:
            function(*args)
        except Exception as error:  # of the network, of the server, of a folder
            self._has_failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(f"{self.tracker}: {reason}; training goes on without it")

    def _begin(self) -> None:
        file = os.path.join(self.folder, self.run_file)
        before = ""
        if self._is_resumed() and os.path.isfile(file):
            with open(file) as content:
                before = content.read().strip()
        run_id = self.start_run(before)
        if run_id != before:
            with open(file, "w") as content:
                content.write(run_id)
