"""Weights & Biases, optional: it receives everything that TensorBoard does."""

from collections import defaultdict
from typing import Any, Callable, Dict, Mapping

from detectron2.utils.events import get_event_storage

from balanced_d2.engine.run_writer import RunWriter, Scalars

# The horizontal axis of every chart. Not W&B's own steps: these never go back, as a training does
# that is resumed from a checkpoint.
AXIS = "iteration"


class WandbWriter(RunWriter):
    """Writes all scalars, images and histograms to a run of Weights & Biases, and the config.

    Has to come before TensorBoard's writer, which removes the images that it has written.

    Args:
        folder: ``OUTPUT_DIR``, also for W&B's own files.
        project: its name; created if there is none.
        name: of the run; "" for one that W&B chooses.
        config: the config of the run.
        is_resumed, window_size: as for :class:`RunWriter`.
    """

    tracker = "Weights & Biases"
    run_file = "wandb_run_id"

    def __init__(
        self,
        folder: str,
        project: str,
        name: str = "",
        config: Mapping[str, Any] | None = None,
        is_resumed: Callable[[], bool] = lambda: False,
        window_size: int = 20,
    ):
        super().__init__(folder, is_resumed, window_size)
        self._project = project
        self._name = name
        self._config = dict(config or {})
        self._run: Any = None
        self.attempt(self._log_in)

    def _log_in(self) -> None:
        """Ask for the key, if there is none, when the program starts, not at the first result."""
        import wandb

        wandb.login()

    def start_run(self, run_id: str) -> str:
        import wandb

        self._run = wandb.init(
            project=self._project,
            name=self._name or None,
            dir=self.folder,
            config=self._config,
            id=run_id or None,
            resume="allow" if run_id else None,
            allow_val_change=True,  # a resumed training may have another learning rate
            reinit="create_new",
        )
        self._run.define_metric("*", step_metric=AXIS)
        return self._run.id

    def log(self, scalars: Scalars) -> None:
        import wandb

        rows: Dict[int, Dict[str, Any]] = defaultdict(dict)
        for name, (value, iteration) in scalars.items():
            rows[iteration][name] = value
        # As TensorBoard's writer reads them; the storage has no other access.
        storage = get_event_storage()
        for name, image, iteration in storage._vis_data:  # (C, H, W)
            rows[iteration][name] = wandb.Image(image.transpose(1, 2, 0))
        for histogram in storage._histograms:
            edges = [histogram["min"], *histogram["bucket_limits"]]
            rows[histogram["global_step"]][histogram["tag"]] = wandb.Histogram(
                np_histogram=(histogram["bucket_counts"], edges)
            )
        for iteration, row in sorted(rows.items()):
            self._run.log({AXIS: iteration, **row})

    def end_run(self, is_complete: bool) -> None:
        self._run.finish(exit_code=0 if is_complete else 1)
