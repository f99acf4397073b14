"""What users bring: a class or a function in a file of theirs, or in a module that can be imported."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from shardes.config import ConfigError


def load_class(path: str) -> Any:
    """An object of the class that `path`, written file.py:Class, names; it is made without arguments.

    While its file loads, modules beside it can be imported.

    Raises:
        ConfigError: a file or class that cannot be used, or has neither of a task's ways to score.
    """
    with own_class("task.path", path) as made_of:
        class_name = made_of.__name__
        try:
            task = made_of()
        except Exception as error:
            raise ConfigError(f"task.path={path}: {class_name}() raised {_in_words(error)}") from error
    if not callable(getattr(task, "prompts", None)):
        raise ConfigError(f"task.path={path}: {class_name} has no prompts(); see shardes.tasks.Task")
    if not any(callable(getattr(task, method, None)) for method in ("score", "reward")):
        raise ConfigError(f"task.path={path}: {class_name} has no score() and no reward(); see shardes.tasks.Task")
    if not hasattr(task, "score"):
        _check_call(f"task.path={path}: reward", task.reward, split="train", number=0, response="")
    return task


@contextmanager
def own_class(key: str, path: str) -> Iterator[type]:
    """The class that the setting `key` names as file.py:Class, while modules beside the file can be imported.

    Raises:
        ConfigError: a file that cannot be used, or has no such class.
    """
    file, class_name = _parts(key, path, "file.py:Class")
    with _within_reach(Path(file).resolve().parent):
        module = _from_file(key, path, file)
        made_of = getattr(module, class_name, None)
        if not isinstance(made_of, type):
            raise ConfigError(f"{key}={path}: no class {class_name} there{_names(module, type)}")
        yield made_of


def load_function(place: str) -> Callable[[str, dict], float]:
    """The reward function that `place`, written file.py:function or module:function, names.

    A module may lie in the working directory or be installed. While a file loads, modules beside it can be imported.

    Raises:
        ConfigError: a file, module or function that cannot be used, or does not take (response, example).
    """
    source, name = _parts("task.reward", place, "my_module:function or my_reward.py:function")
    if source.endswith(".py") or "/" in source:
        with _within_reach(Path(source).resolve().parent):
            module = _from_file("task.reward", place, source)
    else:
        with _within_reach(Path.cwd()):
            module = _by_name("task.reward", place, source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"task.reward={place}: no function {name} there{_names(module, Callable)}")
    _check_call(f"task.reward={place}", function, response="", example={})
    return function


def _check_call(what: str, function: Callable, **arguments: Any) -> None:
    try:
        signature(function).bind(*arguments.values())
    except TypeError as error:
        raise ConfigError(f"{what} must take ({', '.join(arguments)}): {error}") from None
    except ValueError:  # written in C: it does not say what it takes
        pass


def _parts(key: str, place: str, form: str) -> tuple[str, str]:
    source, colon, name = place.rpartition(":")
    if not (colon and source and name):
        raise ConfigError(f"{key}={place}: must be written {form}")
    return source, name


@contextmanager
def _within_reach(directory: Path) -> Iterator[None]:
    # Only while something loads, lest a neighbour be taken later for an installed module.
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _from_file(key: str, place: str, file: str) -> ModuleType:
    if not Path(file).is_file():
        raise ConfigError(f"{key}={place}: there is no file {Path(file).absolute()}")
    source = Path(file).resolve()
    # Named by its place: it can pass neither for an installed module nor for another user's file of its name.
    name = f"shardes_task_{hashlib.sha256(str(source).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}={place}: {source.name} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(f"{key}={place}: importing {source} raised {_in_words(error)}") from error
    return module


def _by_name(key: str, place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{key}={place}: there is no module {name}, neither in {Path.cwd()} nor installed"
            ) from None
        raise ConfigError(f"{key}={place}: importing {name} raised {_in_words(error)}") from error


def _names(module: ModuleType, kind: Any) -> str:
    own = [name for name, value in vars(module).items() if isinstance(value, kind) and not name.startswith("_")]
    own = [name for name in own if getattr(vars(module)[name], "__module__", None) == module.__name__]
    return f"; it has {', '.join(own)}" if own else ""


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
