"""When each update of a run ended, for benchmarks that train in their own process."""

import time

import lightning

ends: dict[int, float] = {}  # update -> seconds of the clock


class Clock(lightning.Callback):
    """Notes the time after every training batch."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: object) -> None:
        """Called by Lightning."""
        ends[trainer.global_step] = time.perf_counter()
