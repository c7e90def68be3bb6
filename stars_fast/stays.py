"""What stays in the process that made it."""

from __future__ import annotations

from typing import NoReturn


class Stays:
    """Refuses to be pickled and copied: it has slots, locks and threads, which do not travel, and weights, which are
    dear. By default Python would say so of some inner part that nobody has heard of.
    """

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, as for another process or by deepcopy: build the "
            "engine from paths inside each worker, StarsEngine('policy', 'reward'); threads may share one engine"
        )
