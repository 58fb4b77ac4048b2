"""MLflow, optional: the config and every scalar of a training."""

import os
import re
import time
from typing import Any, Callable, Mapping

from balanced_d2.engine.run_writer import RunWriter, Scalars

# What MLflow takes in one call, and the characters that it takes in names and values.
MAX_PARAMS, MAX_METRICS, MAX_LENGTH = 100, 1000, 500
NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class MLflowWriter(RunWriter):
    """Writes all scalars to a run of MLflow, and the config as its parameters.

    Args:
        folder: ``OUTPUT_DIR``. ``config.yaml`` in it becomes a file of the run.
        experiment: its name; created if there is none.
        name: of the run; "" for one that MLflow chooses.
        uri: where to, for example "sqlite:///mlflow.db" or the address of a server; "" for MLflow's
            own default, which the environment variable ``MLFLOW_TRACKING_URI`` sets.
        params: values by their names.
        is_resumed, window_size: as for :class:`RunWriter`.
    """

    tracker = "MLflow"
    run_file = "mlflow_run_id"

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
        super().__init__(folder, is_resumed, window_size)
        self._experiment = experiment
        self._name = name
        self._uri = uri
        self._params = dict(params or {})
        self._client: Any = None
        self._run_id = ""

    def start_run(self, run_id: str) -> str:
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri or None)
        if run_id:
            self._client.update_run(run_id, status="RUNNING")
        self._run_id = run_id or self._create()
        config = os.path.join(self.folder, "config.yaml")
        if os.path.isfile(config):
            self._client.log_artifact(self._run_id, config)
        return self._run_id

    def log(self, scalars: Scalars) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(NOT_IN_NAMES.sub("_", name), float(value), now, iteration)
            for name, (value, iteration) in scalars.items()
        ]
        for begin in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[begin : begin + MAX_METRICS])

    def end_run(self, is_complete: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if is_complete else "FAILED")

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
