from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from spa_compiler.placement import contests, guard, place

# How long an example takes says how busy the machine is; tests of speed say so.
settings.register_profile("spa", deadline=None)
settings.load_profile("spa")

pytest.register_assert_rewrite("tests.onnx_text", "tests.networks", "tests.kernel_harness", "tests.region_harness")


@pytest.fixture(scope="session", autouse=True)
def spa_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the test run's own; what depends on nothing but its content is kept from run to run."""
    folder = tmp_path_factory.mktemp("spa-cache")
    cache = getattr(request.config, "cache", None)  # there is none with `-p no:cacheprovider`
    for name in ("objects", "zig", "cuda", "cuda-emulator") if cache else ():
        (folder / name).symlink_to(cache.mkdir(f"spa-{name}"), target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPA_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def short_races() -> Iterator[None]:
    """Compilations spend little time on measuring, and none at shapes that were not asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "_RACE_S", 0.2)
        patch.setattr(contests, "_BUDGET_S", 0.1)
        patch.setattr(guard, "other_shapes", lambda *_: [])
        patch.setattr(contests, "_EACH_S", 0.01)
        yield
