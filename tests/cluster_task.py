"""A task that worker processes can import."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class WriteFile:
    """Writes `<number>.txt` atomically, and beside it a note of each call; some numbers fail."""

    folder: Path
    seconds: float = 0.0
    raises: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()

    def __call__(self, number: int) -> None:
        note = self.folder / f"{number}.{os.getpid()}.call"
        note.write_text(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
        time.sleep(self.seconds)
        if number in self.raises:
            raise RuntimeError(f"no file for {number}")
        if number in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        temporary = note.with_suffix(".part")
        temporary.write_text(f"{number} squared is {number**2}\n")
        temporary.replace(self.folder / f"{number}.txt")
