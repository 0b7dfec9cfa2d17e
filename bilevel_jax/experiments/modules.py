"""Modules of the user that register problems: a config's key `modules`, and arguments of `list`."""

import importlib
import importlib.util
import sys
from pathlib import Path

from bilevel_jax.core.errors import InputError


def import_module(name: str, beside: Path) -> str:
    """Import a module, or a file whose name ends in .py, relative to the directory `beside`; each once.

    Returns:
      The name under which it is found again from anywhere: a file's absolute path.

    Raises:
      InputError: it does not exist, or raises while it is imported.
    """
    is_file = name.endswith(".py")
    path = (beside / name).resolve()
    if is_file and not path.is_file():
        raise InputError(f"modules: there is no file {path}; give its path relative to the config, or absolute")
    try:
        if is_file:
            _run(path)
        else:
            importlib.import_module(name)
    except Exception as error:  # whatever the user's code raises
        raise InputError(f"modules: {name} cannot be imported ({type(error).__name__}: {error})") from error
    return str(path) if is_file else name


def _run(path: Path) -> None:
    """Run a file as a module of its own, unless that was done."""
    name = f"bilevel_jax_modules.{path}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
