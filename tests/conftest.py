"""For all tests."""

from multiprocessing.context import BaseContext

import pytest
from hypothesis import settings

settings.register_profile("blaq", deadline=None)  # nothing here is a test of time
settings.load_profile("blaq")


@pytest.fixture(scope="session")
def server() -> None:
    """The process that sweeps fork their runs from has imported what runs on digits need: a second and more in each."""
    from blaq.train.executors import _context

    preload = BaseContext.set_forkserver_preload

    def more(self: BaseContext, names: list[str]) -> None:
        preload(self, [*names, "sklearn.datasets", "torch.utils.tensorboard"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseContext, "set_forkserver_preload", more)
        _context()  # starts it
