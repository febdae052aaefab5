"""What a command line names: a problem, built in or `file.py:function`, and a solver with its options."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import Array, PyTree
from optax import contrib

from ..core.errors import InputError, check_choice
from ..core.optimizer import optimizer
from ..core.problem import Problem
from ..core.registry import catalog
from ..core.solver import Solver
from ..core.stopping import StoppingRule
from ..problems import PROBLEMS, Instance, instance, options
from ..report.points import load_point

__all__ = [
    "Target",
    "choose_solver",
    "find_problem",
    "is_built_in",
    "optax_factories",
    "parse_settings",
    "usable_options",
]

_OPTAX = str(Path(optax.__file__).parent)
# What `--with` takes, of the catalog's kinds.
_SOLVERS = ("transformation", "solver", "round")
# The first three ask for what a command line cannot give: gradients of single examples, another
# optimizer, a function. The last one is deprecated.
_UNUSABLE = {"dpsgd", "schedule_free", "sophia", "optimistic_adam"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A problem as the command line knows it."""

    name: str
    chosen: Mapping[str, Any]
    problem: Problem | Callable[..., Any]
    begin: Any  # a point, a function of a key, or None
    description: str
    answer: str
    measure: Callable[[PyTree], Mapping[str, float]]
    draw: Callable[[PyTree], Mapping[str, Any]]
    view: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None
    solver: Solver | None = None
    stop: StoppingRule | None = None

    def start(self, key: Array) -> PyTree | None:
        """The starting point that the problem itself has, if it has one."""
        # A model may be callable too, but is made of leaves.
        if not (callable(self.begin) and jax.tree_util.all_leaves([self.begin])):
            return self.begin
        try:
            return self.begin(key)
        except InputError:
            raise
        except Exception as error:
            raise InputError("x0", f"a function that fails with {_words(error)}", "key -> point") from error

    def starts(self, init: str | None) -> Callable[[Array], PyTree]:
        """The starting point of a key: the one in the file `init`, or the problem's own.

        **Raises:** `InputError` where there is neither.
        """
        if init is not None:
            point = self.point(Path(init), "--init")
            return lambda key: point
        if self.begin is None:
            expected = f"a file with the starting point, or `x0` in {self.name.split(':')[0]}"
            raise InputError("--init", "nothing", expected)
        return self.start

    def point(self, file: Path, argument: str) -> PyTree:
        """A point from a file, in the form of the problem's own start."""
        return load_point(file, self.start(jax.random.key(0)), argument=argument)

    def about(self) -> dict[str, Any]:
        """The problem as a report shows it."""
        bound = self.problem.lower_bound if isinstance(self.problem, Problem) else None
        return {
            "name": self.name,
            "options": dict(self.chosen),
            "description": self.description,
            "answer": self.answer,
            "lower_bound": None if bound is None else float(bound),
        }


def parse_settings(flag: str, settings: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` items as a dictionary; values are Python literals where they can be, else text.

    **Raises:** `InputError` for an item without `=`, or a name given twice.
    """
    found: dict[str, Any] = {}
    for item in settings:
        name, equals, text = item.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise InputError(flag, repr(item), "NAME=VALUE")
        if name in found:
            raise InputError(flag, f"{name} twice", "each name once")
        spelled = {"true": "True", "false": "False", "none": "None"}.get(text.strip().lower(), text.strip())
        try:
            found[name] = ast.literal_eval(spelled)
        except (ValueError, SyntaxError, TypeError):
            found[name] = text.strip()
    return found


def is_built_in(name: str) -> bool:
    """Whether a name, kebab or snake, is that of a built-in problem."""
    return name.replace("_", "-") in PROBLEMS


def find_problem(name: str, chosen: Mapping[str, Any]) -> Target:
    """A built-in problem with its options, or `file.py:function`.

    **Raises:** `InputError` where there is no such problem, file or function, or the file fails.
    """
    if ".py" in name:
        if chosen:
            raise InputError("--option", ", ".join(chosen), "none: they belong to built-in problems")
        return _from_file(name)
    if not is_built_in(name):
        check_choice("PROBLEM", name, [*PROBLEMS, "file.py:function"])
    made = instance(name, **chosen)
    kebab = name.replace("_", "-")
    return _target(kebab, {**options(kebab), **chosen}, made)


def _target(name: str, chosen: Mapping[str, Any], made: Instance) -> Target:
    fields = (made.problem, made.start, made.description, made.answer, made.measure, made.draw)
    return Target(name, chosen, *fields, made.view, made.solver, made.stop)


def _from_file(name: str) -> Target:
    file, _, attribute = name.rpartition(":")
    if not file.endswith(".py") or not attribute:
        raise InputError("PROBLEM", repr(name), "file.py:function")
    path = Path(file)
    if not path.is_file():
        raise InputError("PROBLEM", repr(name), f"a file; there is no {path}")
    module = _import(path)
    known = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v) and inspect.isfunction(v)]
    problem = getattr(module, attribute, None)
    if isinstance(problem, Instance):
        return _target(name, {}, problem)
    if not (callable(problem) or isinstance(problem, Problem)):
        raise InputError("PROBLEM", repr(name), f"a function or a problem in {path}, such as {', '.join(known) or '…'}")
    words = inspect.getdoc(problem) if inspect.isfunction(problem) else None
    description = f"{name}: {words.splitlines()[0]}" if words else name
    return Target(name, {}, problem, getattr(module, "x0", None), description, "", lambda x: {}, lambda x: {})


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("user_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError) and error.filename:  # of the file, or of one that it imports
            place, what = f"{error.filename}, line {error.lineno}", f"{type(error).__name__}: {error.msg}"
        else:
            frames = traceback.extract_tb(error.__traceback__)
            lines = [f", line {frame.lineno}" for frame in frames if frame.filename == spec.origin]
            place, what = f"{path}{lines[-1] if lines else ''}", _words(error)
        raise InputError("PROBLEM", f"{place}: {what}", "a file that can be imported") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def choose_solver(name: str, chosen: Mapping[str, Any], seed: int) -> Solver:
    """A method of the catalog, or an optimizer of Optax, with its options.

    An optimizer that wants a key of its own gets `seed`, unless `chosen` has one.

    **Raises:** `InputError` where there is none of this name, or an option that cannot be used.
    """
    kebab = name.replace("_", "-")
    rows = {row.id: row for row in catalog().values() if row.kind in _SOLVERS}
    ready = {snake.replace("_", "-"): factory for snake, factory in optax_factories().items()}
    if kebab not in rows and kebab not in ready:
        check_choice("--with", name, [*rows, *ready])
    factory = rows[kebab].load() if kebab in rows else ready[kebab]
    parameters = inspect.signature(factory).parameters
    for option in chosen:
        check_choice(f"option of {kebab}", option, parameters)
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    missing = [n for n in needed if n not in chosen]
    if missing:
        raise InputError("--set", ", ".join(chosen) or "nothing", f"also {', '.join(missing)}, for {kebab}")
    if kebab in rows and rows[kebab].kind != "transformation":
        return factory(**chosen)
    own_key = {"key": seed} if "key" in parameters else {}
    return optimizer(factory, **{**own_key, **chosen})


@contextmanager
def usable_options(name: str, settings: Sequence[str]) -> Generator[None]:
    """What fails inside Optax is an option of it: it looks at few of them before it runs.

    **Raises:** `InputError` in the place of such a failure.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, InputError) or not any(frame.filename.startswith(_OPTAX) for frame in frames):
            raise
        expected = f"options that {name} can use; it fails with {_words(error)}"
        raise InputError("--set", " ".join(settings), expected) from error


def _words(error: BaseException) -> str:
    reason = " ".join(str(error).split())
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def optax_factories() -> dict[str, Callable[..., Any]]:
    """Optax's optimizers by name: what has a learning rate and gives back a transformation."""
    found: dict[str, Callable[..., Any]] = {}
    for module in (contrib, optax):
        for name in dir(module):
            factory = getattr(module, name)
            if name.startswith(("_", "scale_by", "inject")) or name in _UNUSABLE or not inspect.isfunction(factory):
                continue
            if {"learning_rate", "max_learning_rate"} & inspect.signature(factory).parameters.keys():
                found[name] = factory
    return found
