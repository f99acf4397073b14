import pytest

from shardes.noise import reference


@pytest.fixture(scope="package", autouse=True)
def small_blocks():
    """Blocks for which torch starts no threads: on a busy machine they wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BLOCK", 10_000)
        yield
