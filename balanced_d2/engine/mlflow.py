"""MLflow, optional: the config and every scalar of a training."""

import logging
import os
import re
import sys
import time
from typing import Any, Callable, Dict, Mapping

from detectron2.utils.events import EventWriter, get_event_storage

from balanced_d2.engine.after_evaluation import StopEarly

logger = logging.getLogger(__name__)

# In OUTPUT_DIR: the run that a resumed training continues.
RUN_FILE = "mlflow_run_id"
# What MLflow takes in one call, and the characters that it takes in names and values.
MAX_PARAMS, MAX_METRICS, MAX_LENGTH = 100, 1000, 500
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class MLflowWriter(EventWriter):
    """Writes all scalars to a run of MLflow, and the config as its parameters.

    If MLflow cannot be reached, there is one warning, and training goes on without it.

    Args:
        folder: ``OUTPUT_DIR``. ``config.yaml`` in it becomes a file of the run, and the run's id is
            kept there.
        experiment: its name; created if there is none.
        name: of the run; "" for one that MLflow chooses.
        uri: where to, for example "sqlite:///mlflow.db" or the address of a server; "" for MLflow's
            own default, which the environment variable ``MLFLOW_TRACKING_URI`` sets.
        params: values by their names.
        is_resumed: whether the training continues, and so its run. Asked when there is something
            to write.
        window_size: the number of iterations that scalars are smoothed over, as in TensorBoard.
    """

    def __init__(
        self,
        folder: str,
        experiment: str,
        name: str = "",
        uri: str = "",
        params: Mapping[str, Any] | None = None,
        is_resumed: Callable[[], bool] = lambda: False,
        window_size: int = 20,
    ):
        self._folder = folder
        self._experiment = experiment
        self._name = name
        self._uri = uri
        self._params = dict(params or {})
        self._is_resumed = is_resumed
        self._window_size = window_size
        self._last_write = -1
        self._client: Any = None
        self._run_id = ""
        self._has_failed = False

    def write(self):
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        new = {name: value for name, value in latest.items() if value[1] > self._last_write}
        if not new or self._has_failed:
            return
        self._last_write = max(iteration for _, iteration in new.values())
        self._try(self._log, new)

    def close(self):
        if not self._run_id or self._has_failed:
            return
        error = sys.exc_info()[1]
        is_complete = error is None or isinstance(error, StopEarly)
        status = "FINISHED" if is_complete else "FAILED"
        self._try(lambda: self._client.set_terminated(self._run_id, status))

    def _try(self, function: Callable, *args: Any) -> None:
        try:
            function(*args)
        except Exception as error:  # of the network, of the server, of a folder
            self._has_failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.warning(f"MLflow: {reason}; training goes on without it")

    def _log(self, new: Dict[str, Any]) -> None:
        from mlflow.entities import Metric

        if not self._run_id:
            self._start()
        now = int(1000 * time.time())
        metrics = [
            Metric(NOT_IN_NAMES.sub("_", name), float(value), now, iteration)
            for name, (value, iteration) in new.items()
        ]
        for begin in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + MAX_METRICS])

    def _start(self) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri or None)
        file = os.path.join(self._folder, RUN_FILE)
        if self._is_resumed() and os.path.isfile(file):
            with open(file) as content:
                run_id = content.read().strip()
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
        else:
            self._run_id = self._create()
            with open(file, "w") as content:
                content.write(self._run_id)
        config = os.path.join(self._folder, "config.yaml")
        if os.path.isfile(config):
            self._client.log_artifact(self._run_id, config)

    def _create(self) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(self._experiment)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(self._experiment)
        )
        run_id = self._client.create_run(number, run_name=self._name or None).info.run_id
        params = [Param(name, str(value)[:MAX_LENGTH]) for name, value in self._params.items()]
        for begin in range(0, len(params), MAX_PARAMS):
            self._client.log_batch(run_id, params=params[begin : begin + MAX_PARAMS])
        return run_id
