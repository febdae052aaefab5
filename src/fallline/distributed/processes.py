"""Several processes that make one run.

`join()` stands at the beginning of a script: started by `fallline launch N script.py` (or by a cluster's launcher,
after `jax.distributed.initialize()`), it gives the mesh of all devices of all processes; started alone, None, so that
the same script simulates.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import jax
from jax.sharding import Mesh

from .workers import mesh_of

__all__ = ["BEAT_SECONDS", "Invitation", "join"]

BEAT_SECONDS = 0.5
_PREFIX = "FALLLINE_LAUNCH_"
_LOST = 4


class Invitation:
    """What a launcher tells a process by its environment: who leads, how many there are, which one this is."""

    def __init__(self, coordinator: str, processes: int, rank: int, beats: str):
        self.coordinator, self.processes, self.rank, self.beats = coordinator, processes, rank, beats

    def environment(self) -> dict[str, str]:
        """As variables of the environment."""
        return {f"{_PREFIX}{name.upper()}": str(value) for name, value in vars(self).items()}

    @staticmethod
    def found() -> Invitation | None:
        """The invitation in this process's environment."""
        names = ("coordinator", "processes", "rank", "beats")
        said = [os.environ.get(f"{_PREFIX}{name.upper()}") for name in names]
        if None in said:
            return None
        coordinator, processes, rank, beats = (str(value) for value in said)
        return Invitation(coordinator, int(processes), int(rank), beats)


def join() -> Mesh | None:
    """The mesh of all devices of all processes, for `Sharded(…, mesh=join())`; None where this process is alone.

    To be called before anything is computed, as JAX asks. Where a launcher of a cluster has started the processes, call
    `jax.distributed.initialize()` first.
    """
    invitation = Invitation.found()
    if invitation is not None and not jax.distributed.is_initialized():
        _beat(Path(invitation.beats) / str(invitation.rank))
        jax.config.update("jax_enable_preemption_service", False)  # it would swallow the launcher's SIGTERM
        jax.distributed.initialize(invitation.coordinator, invitation.processes, invitation.rank)
    return mesh_of() if jax.process_count() > 1 else None


def _beat(file: Path) -> None:
    """Show the launcher twice a second that this process is alive; end when the launcher is gone."""
    launcher = os.getppid()

    def run() -> None:
        while os.getppid() == launcher:
            file.touch()
            time.sleep(BEAT_SECONDS)
        os._exit(_LOST)

    file.touch()
    threading.Thread(target=run, name="fallline-beat", daemon=True).start()
