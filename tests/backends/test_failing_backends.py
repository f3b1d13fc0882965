"""What is wrong with somebody's backend is said in one line, wherever the device lives."""

import pytest

from raygraft import LLM
from raygraft.graph.errors import ConfigurationError
from raygraft.kernels import BackendOptions, create_backend

CLASS = "from raygraft.kernels.base import Backend\nclass Mine(Backend):\n"
RAISES = f"""{CLASS}
    describe = load = None
    def __init__(self, options):
        raise OSError("no board")
"""

WRONG = [
    pytest.param(None, "no such file on this machine", id="no file"),
    pytest.param("x = 1", "it has no class Mine", id="no class"),
    pytest.param("import no_such_module", "cannot be imported: ModuleNotFoundError", id="import"),
    pytest.param("class Mine: pass", "is no subclass of raygraft.kernels.base.Backend", id="kind"),
    pytest.param(f"{CLASS}    pass", "cannot be started: TypeError: Can't inst", id="abstract"),
    pytest.param(RAISES, "cannot be started: OSError: no board", id="raises"),
]


@pytest.fixture
def backend(tmp_path, request):
    """A path to a class `Mine` in a file with this source; no file for None."""
    if request.param is not None:
        (tmp_path / "mine.py").write_text(request.param)
    return f"{tmp_path / 'mine.py'}:Mine"


def refused(message, **arguments):
    with pytest.raises(ConfigurationError) as error:
        LLM(**arguments)
    assert error.value.exit_code == 2
    assert str(error.value).startswith("device board: backend ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("backend", "message"), WRONG, indirect=["backend"])
def test_in_this_process(backend, message, tiny_model):
    devices = ["cpu", {"name": "board", "backend": backend}]
    refused(message, model=tiny_model, devices=devices, runtime="in-process")


@pytest.mark.ray
@pytest.mark.parametrize(("backend", "message"), WRONG, indirect=["backend"])
def test_in_an_actor(backend, message, tiny_model, ray_cluster):
    devices = [{"name": "board", "backend": backend, "threads": 1}]
    refused(message, model=tiny_model, devices=devices)


def test_an_entry_point_that_cannot_be_imported(tmp_path, monkeypatch):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raygraft.backends]\nbroken = not_there:Mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    message = "backend 'broken': not_there:Mine cannot be imported: ModuleNotFoundError"
    with pytest.raises(ConfigurationError, match=message):
        create_backend("broken", BackendOptions())
