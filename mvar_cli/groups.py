"""Option groups: classes whose fields become options of every command that has the group as one parameter.

A command is written with typed parameters; `flattened` gives typer the function that it can read, and turns what was
typed back into the command's own parameters.
"""

import inspect
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import mvar_core as mvar


class Group:
    """Some options that belong together.

    Fields are annotated as typer reads options. What was typed becomes an object of the class of `mvar_core` that
    `builds` names, from the fields that are not None; without `builds`, a dictionary of them.
    """

    builds: ClassVar[str | None] = None

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One keyword parameter for each field."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(cls, name), annotation=hint)
            for name, hint in hints.items()
            if name != "builds"
        ]

    @classmethod
    def build(cls, values: dict[str, Any]) -> Any:
        """The group's object, from what was typed."""
        given = {name: value for name, value in values.items() if value is not None}
        return given if cls.builds is None else getattr(mvar, cls.builds).of(**given)


def flattened(run: Callable[..., None]) -> Callable[..., None]:
    """A command's function with the fields of its groups as parameters of their own, in the groups' places."""
    hints = typing.get_type_hints(run, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if inspect.isclass(kind) and issubclass(kind, Group)}
    parameters = []
    for parameter in inspect.signature(run).parameters.values():
        if parameter.name in groups:
            parameters += groups[parameter.name].parameters()
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hints[parameter.name]))

    @wraps(run)
    def with_options(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group.build({option.name: values.pop(option.name) for option in group.parameters()})
        run(**values)

    return with_signature(with_options, parameters)


def with_signature(function: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """The function, which typer reads as having these parameters."""
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function
