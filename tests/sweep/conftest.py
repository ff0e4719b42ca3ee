"""What the sweeps share."""

import pytest
from helpers.extras import installed


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """One of everything that the commands read, by name; nothing changes it."""
    from helpers.made import make_everything

    return make_everything(tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def without_the_net(monkeypatch, offline):
    """A name that is no folder is looked for in the caches, never on the Hub."""
    import transformers.utils.hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True, raising=False)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """What a command writes under a relative name, as some values are, goes with the test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


@pytest.fixture(autouse=True)
def with_its_extra(request):
    """A command that does nothing without an extra is swept where that is."""
    command = getattr(getattr(request.node, "callspec", None), "params", {}).get("command")
    if (extra := getattr(command, "extra", None)) and not installed(extra):
        pytest.skip(f"needs the extra {extra}")
