"""The registry that formats and backends share."""

import sys
from pathlib import Path

import pytest

from evalkit.errors import InputError
from evalkit.registry import Registry


class Plugin:
    name = "alpha_one"


class Other(Plugin):
    name = "beta"


@pytest.fixture
def registry() -> Registry[Plugin]:
    made: Registry[Plugin] = Registry("plug-in")
    made.register(Plugin)
    made.register(Other)
    return made


def test_an_entry_is_an_instance_found_by_name(registry: Registry[Plugin]):
    assert type(registry.get("beta")) is Other
    assert registry.names() == ["alpha_one", "beta"]


def test_a_duplicate_is_rejected_and_both_classes_are_named(registry: Registry[Plugin]):
    class Third(Plugin):
        pass

    with pytest.raises(InputError, match=r"'alpha_one' of .*Third is already registered by .*Plugin"):
        registry.register(Third)
    assert type(registry.get("alpha_one")) is Plugin


def test_a_miss_is_answered_with_the_closest_name(registry: Registry[Plugin]):
    with pytest.raises(InputError, match="unknown plug-in 'alpha_on': did you mean 'alpha_one'"):
        registry.get("alpha_on")
    with pytest.raises(InputError, match="unknown plug-in 'zzz': There are alpha_one, beta"):
        registry.get("zzz")


def test_an_entry_can_be_removed_once(registry: Registry[Plugin]):
    registry.remove("beta")
    assert registry.names() == ["alpha_one"]
    with pytest.raises(InputError, match="unknown plug-in 'beta'"):
        registry.remove("beta")


def test_discovery_imports_every_module_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "some_plugins"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from evalkit.registry import Registry\nfound = Registry('plug-in')\n"
    )
    for name in ("one", "two"):
        source = f"from some_plugins import found\n\n@found.register\nclass It:\n    name = {name!r}\n"
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        import some_plugins

        some_plugins.found.discover("some_plugins")
        assert some_plugins.found.names() == ["one", "two"]
    finally:
        for module in [name for name in sys.modules if name.startswith("some_plugins")]:
            del sys.modules[module]
