"""Rewards by name. Their modules are imported only where they are used: in the workers."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.rewards import check_reward_name
from nested_reft_mcore.rewards.base import RewardItem, Scope, scope_of

_HERE = "nested_reft_mcore.rewards"
REWARDS = {
    "numeric_match": f"{_HERE}.numeric_match:numeric_match",
    "math_verify": f"{_HERE}.math_verify:math_verify_reward",
    "exact_match": f"{_HERE}.exact_match:exact_match",
    "multiple_choice": f"{_HERE}.multiple_choice:multiple_choice",
    "format": f"{_HERE}.response_format:response_format",
    "length": f"{_HERE}.length:length_within",
    "relative_length": f"{_HERE}.length:relative_length",
}
"""Name to `module:function`."""


@dataclass(frozen=True)
class LoadedReward:
    """A reward function that is ready to be called."""

    function: Callable[..., Any]
    """Takes an item, or a sequence of them, and `options`."""
    scope: Scope
    options: Mapping[str, Any]


def load_reward(name: str, options: Mapping[str, Any] | None = None) -> LoadedReward:
    """The reward called `name`, or the one at `module:function` or `file.py:function`.

    Raises:
        UserError: there is none, it cannot be imported, or it does not take the options.
    """
    check_reward_name(name, "reward: name")
    place, _, function_name = REWARDS.get(name, name).rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import(place)
        function = getattr(module, function_name)
    except (Exception, SystemExit) as error:  # a user's module may do anything when imported
        raise UserError(
            f"reward: name is {name!r}: cannot be imported: {type(error).__name__}: {error}"
            f"{_line_of(error, place)}{_search_path(error)}"
        ) from error
    if not callable(function):
        raise UserError(f"reward: {name!r} is a {type(function).__name__}; expected a function")
    loaded = LoadedReward(function, scope_of(function), dict(options or {}))
    _check_kind(name, loaded)
    _check_options(name, function, loaded.options)
    if name in REWARDS and options:
        _try_options(name, loaded)
    return loaded


def _check_kind(name: str, reward: LoadedReward) -> None:
    """Refuse what can be called and never gives a number."""
    function = reward.function
    kind = ""
    if inspect.isclass(function):
        kind = "a class"
    elif inspect.iscoroutinefunction(function):
        kind = "an async function"
    elif reward.scope == "item" and inspect.isgeneratorfunction(function):
        kind = "a generator"
    if kind:
        raise UserError(f"reward: {name!r} is {kind}; expected a function that returns a number")


def _line_of(error: BaseException, place: str) -> str:
    """Where in a file of the user's own an import failed; a syntax error says it itself."""
    if not place.endswith(".py") or isinstance(error, SyntaxError):
        return ""
    here = Path(place).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == here]
    return f" ({place}:{lines[-1]})" if lines else ""


def _search_path(error: BaseException) -> str:
    """What a user who sees the file beside him does not expect."""
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return "; modules are found where they are installed, or on PYTHONPATH; not beside the file"


def warm_up(rewards: Sequence[LoadedReward]) -> None:
    """Have loaded what the first call would load, so that no item pays for it.

    Raises:
        UserError: it fails, in too little memory for instance.
    """
    try:
        for reward in rewards:
            if (other := reward.options.get("correct_by")) in REWARDS:
                load_reward(other)
        # Also where a function of the user's own calls it.
        if (module := sys.modules.get(f"{_HERE}.math_verify")) is not None:
            module.warm_up()
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reward: workers cannot be made ready: {type(error).__name__}: {error}"
        ) from error


def _import(module_name: str) -> ModuleType:
    return importlib.import_module(module_name)


def _import_file(path: Path) -> ModuleType:
    """A module from a file, whatever the import path is."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _try_options(name: str, reward: LoadedReward) -> None:
    """Refuse values that a reward of ours would refuse in every call.

    Raises:
        UserError: names the option, or says what the reward says.
    """
    hints = get_type_hints(reward.function)
    for key, value in reward.options.items():
        try:
            TypeAdapter(hints[key]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = str(error.errors()[0]["msg"]).removeprefix("Input should be ")
            raise UserError(
                f"reward: option {key} of {name!r}: expected {expected}, got {value!r}"
            ) from None
    items = [RewardItem("1", "\\boxed{1}", "1", num_tokens=count) for count in (1, 2)]
    try:
        if reward.scope == "item":
            reward.function(items[0], **reward.options)
        else:
            reward.function(items, **reward.options)
    except Exception as error:  # whatever it is, the first completion would meet it
        raise UserError(f"reward: options of {name!r}: {error}") from error


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a call could not be made with."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions of C have none
        return
    try:
        signature.bind(None, **options)
    except TypeError as error:
        known = ", ".join(list(signature.parameters)[1:]) or "none"
        raise UserError(
            f"reward: options of {name!r} do not fit: {error}; it takes, after what it judges: "
            f"{known}"
        ) from None
