"""A world without MPI: ranks of one host that give each other bytes through a folder."""

import os
import time
from pathlib import Path

import extrapcomm as xc


class Store:
    """Files in a folder, as many as ranks for each exchange."""

    def __init__(self, folder: Path, rank: int, size: int, patience: float = 60.0) -> None:
        self.folder, self.rank, self.size, self.patience = folder, rank, size, patience
        self.exchanges = 0

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def all_gather(self, mine: bytes) -> list[bytes]:
        self.exchanges += 1
        draft = self.folder / f"draft-{self.rank}"
        draft.write_bytes(mine)
        os.replace(draft, self.folder / f"{self.exchanges}-{self.rank}")
        return [self.read(rank) for rank in range(self.size)]

    def read(self, rank: int) -> bytes:
        path, deadline = self.folder / f"{self.exchanges}-{rank}", time.monotonic() + self.patience
        while not path.exists():
            if time.monotonic() > deadline:
                raise xc.CommError(f"rank {rank} did not come to exchange {self.exchanges}")
            time.sleep(1e-3)
        return path.read_bytes()


class StoreWorld(xc.World):
    """Ranks that meet in a folder; one that is alone needs none."""

    def __init__(self, store: Store | None = None, workers: int = 1, **options: object) -> None:
        self.store = store or Store(Path(), 0, 1)
        super().__init__(self.store, workers, **options)

    def _duplicate(self, comm: Store) -> Store:
        return comm

    def _all_gather(self, mine: bytes) -> list[bytes]:
        return [mine] if self.size == 1 else self.store.all_gather(mine)

    def close(self) -> None:
        self._leave()
