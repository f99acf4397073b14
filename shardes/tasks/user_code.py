"""Loading of users' code: a class or function in a file, or in an importable module.

A reference is written file.py:Name or, for functions, module:name.
"""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import iscoroutinefunction, signature
from pathlib import Path
from types import ModuleType
from typing import Any

from shardes.errors import ConfigError, described, nearby

OTHER_TRAINERS = {
    "prompts",
    "completions",
    "queries",
    "solution_str",
}  # parameters of their rewards
BATCH = "score_batch"  # the name of a reward function that takes lists
PACKAGES = {"site-packages", "dist-packages"}


def load_user_task(reference: str) -> Any:
    """An object of a task class, which is called without arguments.

    While its file loads, it can import modules beside it.

    Raises:
        ConfigError: the file or class cannot be used, or the class lacks a method of tasks.
    """
    setting = f"task.path={reference}"
    with user_class("task.path", reference) as task_class:
        name = task_class.__name__
        try:
            task = task_class()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit, too
            raise ConfigError(f"{setting}: {name}() raised {described(error)}") from error
    _check_methods(setting, name, task)
    return task


def check_own_task(task: Any) -> None:
    """Raise ConfigError for an object that cannot be the task of a run in this process.

    Its `reward` could not be called: the worker processes that do so make their own object, and
    know only task.path.
    """
    name = type(task).__name__
    if isinstance(task, type):
        raise ConfigError(f"task={task.__name__}: a class; pass an object, {task.__name__}()")
    if not callable(getattr(task, "score", None)):
        raise ConfigError(
            f"task={name}: has no score(split, responses), which an object needs; a task with "
            f"reward() runs in worker processes: put it in a file and set task.path=file.py:{name}"
        )
    _check_methods(f"task={name}", name, task)


def _check_methods(setting: str, name: str, task: Any) -> None:
    """Raise ConfigError if an object lacks a method of tasks."""
    if not callable(getattr(task, "prompts", None)):
        raise ConfigError(f"{setting}: {name} has no prompts(); see shardes.tasks.Task")
    if not any(callable(getattr(task, method, None)) for method in ("score", "reward")):
        raise ConfigError(
            f"{setting}: {name} has no score() and no reward(); see shardes.tasks.Task"
        )
    if hasattr(task, "score"):
        _check_parameters(f"{setting}: score", task.score, ("split", "responses"))
    else:
        _check_parameters(f"{setting}: reward", task.reward, ("split", "number", "response"))


@contextmanager
def user_class(key: str, reference: str) -> Iterator[type]:
    """The class that a setting names; in the context, modules beside its file can be imported.

    Raises:
        ConfigError: the file cannot be used, or has no such class.
    """
    file, name = _split(key, reference, "file.py:Class")
    with _importable(Path(file).resolve().parent):
        module = _import_file(key, reference, file)
        value = getattr(module, name, None)
        if not isinstance(value, type):
            raise ConfigError(f"{key}={reference}: no class {name} there{_names(module, type)}")
        yield value


def load_reward_function(reference: str) -> Callable[..., Any]:
    """A reward function; its module may be a file, installed, or in the working directory.

    While a file loads, it can import modules beside it.

    Raises:
        ConfigError: it cannot be loaded, or does not take (response, example), or (responses,
            examples) if its name is BATCH.
    """
    key = "task.reward"
    source, name = _split(key, reference, "my_module:function or my_reward.py:function")
    if source.endswith(".py") or "/" in source:
        with _importable(Path(source).resolve().parent):
            module = _import_file(key, reference, source)
    else:
        with _importable(Path.cwd()):
            module = _import_module(key, reference, source)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{key}={reference}: no function {name} there{_names(module, Callable)}")
    lists = ("responses", "examples")
    takes_lists = is_batch(reference)
    if not takes_lists and _parameters(function)[:2] == [*lists]:
        raise ConfigError(
            f"{key}={reference}: takes lists; name it {BATCH}, or write def "
            f"{name}(response, example), which scores one response"
        )
    taken = lists if takes_lists else ("response", "example")
    _check_parameters(f"{key}={reference}", function, taken)
    return function


def is_batch(reference: str) -> bool:
    """Whether a reward function is called once with all responses of a model."""
    return reference.rpartition(":")[2] == BATCH


def is_async(function: Callable) -> bool:
    """Whether calling a function gives a coroutine."""
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)


def code_files(reference: str) -> list[Path]:
    """The files of user code that has been loaded: its own, then those that it uses beside it.

    These are the modules from its directory that its global names refer to, directly or not.
    Installed packages are not among them.
    """
    source, _, _ = reference.rpartition(":")
    is_file = source.endswith(".py") or "/" in source
    module = sys.modules[_module_name(Path(source).resolve()) if is_file else source]
    own = Path(module.__file__ or "").resolve()
    files, modules = [own], [module]
    for module in modules:  # grows
        for value in list(vars(module).values()):
            is_module = isinstance(value, ModuleType)
            name = value.__name__ if is_module else getattr(value, "__module__", None)
            used = sys.modules.get(name) if isinstance(name, str) else None
            file = Path(getattr(used, "__file__", None) or "/").resolve()
            beside = file.is_relative_to(own.parent) and not _is_installed(file)
            if used and beside and file not in files:
                files.append(file)
                modules.append(used)
    return [own, *sorted(files[1:])]


def _is_installed(file: Path) -> bool:
    package = Path(__file__).resolve().parents[1]
    return file.is_relative_to(package) or bool(PACKAGES.intersection(file.parts))


def _parameters(function: Callable) -> list[str]:
    """The names of a function's parameters; none if they are not known."""
    try:
        return [*signature(function).parameters]
    except (TypeError, ValueError):  # a function written in C may have no signature
        return []


def _check_parameters(subject: str, function: Callable, parameters: tuple[str, ...]) -> None:
    try:
        taken = signature(function)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    names = f"({', '.join(parameters)})"
    if OTHER_TRAINERS.intersection([*taken.parameters][: len(parameters)]):
        raise ConfigError(
            f"{subject} takes {taken}, as another trainer's rewards do; it is called with {names}, "
            f"so write def {getattr(function, '__name__', 'reward')}{names}; see docs/tasks.md"
        )
    try:
        taken.bind(*parameters)
    except TypeError as error:
        raise ConfigError(f"{subject} must take {names}: {error}") from None


def _split(key: str, reference: str, form: str) -> tuple[str, str]:
    source, colon, name = reference.rpartition(":")
    if not (colon and source and name):
        raise ConfigError(f"{key}={reference}: must be written {form}")
    return source, name


@contextmanager
def _importable(directory: Path) -> Iterator[None]:
    # Only while the code loads: later, a file in the directory could hide an installed module.
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


def _import_file(key: str, reference: str, file: str) -> ModuleType:
    source = Path(file).resolve()
    if not source.is_file():
        meant = nearby(file, told=True)
        raise ConfigError(f"{key}={reference}: there is no file {Path(file).absolute()}{meant}")
    name = _module_name(source)
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}={reference}: {source.name} is not a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        del sys.modules[name]
        raise ConfigError(
            f"{key}={reference}: importing {source} raised {described(error)}"
        ) from error
    return module


def _module_name(file: Path) -> str:
    # By its path, so that it hides neither an installed module nor another file of its name.
    return f"shardes_task_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"


def _import_module(key: str, reference: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"{key}={reference}: there is no module {name}, "
                f"neither in {Path.cwd()} nor installed"
            ) from None
        raise ConfigError(
            f"{key}={reference}: importing {name} raised {described(error)}"
        ) from error


def _names(module: ModuleType, kind: Any) -> str:
    """The end of a message: the public names of that kind that the module defines."""
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, kind)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    return f"; it has {', '.join(names)}" if names else ""
