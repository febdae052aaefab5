"""What a command line names: a problem, built in or `file.py:function`, and a solver with its options."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jaxtyping import PyTree
from optax import contrib

from ..core.errors import InputError, check_choice
from ..core.optimizer import optimizer
from ..core.problem import Problem
from ..core.registry import catalog
from ..core.solver import Solver
from ..problems import PROBLEMS, Instance, instance, options
from ..report.points import load_point

__all__ = ["Target", "choose_solver", "find_problem", "parse_settings"]


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

    def start(self, seed: int) -> PyTree | None:
        """The starting point that the problem itself has, if it has one."""
        return self.begin(jax.random.key(seed)) if callable(self.begin) else self.begin

    def point(self, file: Path, argument: str) -> PyTree:
        """A point from a file, in the form of the problem's own start."""
        return load_point(file, self.start(0), argument=argument)

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
        except (ValueError, SyntaxError):
            found[name] = text.strip()
    return found


def find_problem(name: str, chosen: Mapping[str, Any]) -> Target:
    """A built-in problem with its options, or `file.py:function`.

    **Raises:** `InputError` where there is no such problem, file or function, or the file fails.
    """
    if ".py" in name:
        if chosen:
            raise InputError("--option", ", ".join(chosen), "none: they belong to built-in problems")
        return _from_file(name)
    if name.replace("_", "-") not in PROBLEMS:
        check_choice("PROBLEM", name, [*PROBLEMS, "file.py:function"])
    made = instance(name, **chosen)
    kebab = name.replace("_", "-")
    return _target(kebab, {**options(kebab), **chosen}, made)


def _target(name: str, chosen: Mapping[str, Any], made: Instance) -> Target:
    return Target(name, chosen, made.problem, made.start, made.description, made.answer, made.measure, made.draw)


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
    except Exception as error:
        if isinstance(error, SyntaxError):
            line, reason = error.lineno, error.msg
        else:
            frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
            line, reason = (frames or [None])[-1], " ".join(str(error).split())
        what = f"{path}, line {line}: {type(error).__name__}: {reason}"
        raise InputError("PROBLEM", what, "a file that can be imported") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


def choose_solver(name: str, chosen: Mapping[str, Any]) -> Solver:
    """A method of the catalog, or an optimizer of Optax, with its options.

    **Raises:** `InputError` where there is none of this name, or an option that cannot be used.
    """
    kebab, snake = name.replace("_", "-"), name.replace("-", "_")
    rows = catalog()
    if kebab in rows:
        factory = rows[kebab].load()
        parameters = inspect.signature(factory).parameters
        for option in chosen:
            check_choice(f"option of {kebab}", option, parameters)
        missing = [n for n, p in parameters.items() if p.default is p.empty and n not in chosen]
        if missing:
            raise InputError("--set", ", ".join(chosen) or "nothing", f"also {', '.join(missing)}, for {kebab}")
        return factory(**chosen)
    factory = optax_factories().get(snake)
    if factory is None:
        known = [*rows, *(n.replace("_", "-") for n in optax_factories())]
        check_choice("--with", name, known)
        raise AssertionError
    return optimizer(factory, **chosen)


def optax_factories() -> dict[str, Callable[..., Any]]:
    """Optax's optimizers by name: what has a learning rate and gives back a transformation."""
    found: dict[str, Callable[..., Any]] = {}
    for module in (contrib, optax):
        for name in dir(module):
            factory = getattr(module, name)
            if name.startswith(("_", "scale_by", "inject")) or not inspect.isfunction(factory):
                continue
            if {"learning_rate", "max_learning_rate"} & inspect.signature(factory).parameters.keys():
                found[name] = factory
    return found
