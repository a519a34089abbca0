"""Option groups: classes whose fields become options of every command that has the group as one parameter.

A command is written with typed parameters; `signature` is the flat one that typer reads, and `grouped` turns what was
typed back into the command's own parameters.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any, ClassVar

import mvar_core as mvar

Command = Callable[..., None]


class Group:
    """Some options that belong together.

    Fields are annotated as typer reads options. What was typed becomes an object of the class of `mvar_core` that
    `builds` names, from the fields that are not None; without `builds`, a dictionary of them.
    """

    builds: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()
    """The fields that are options; empty stands for all."""

    @classmethod
    def only(cls, *names: str) -> type["Group"]:
        """The group with some of its fields, for commands where the others have no effect."""
        return type(cls.__name__, (cls,), {"names": names, "__module__": cls.__module__})

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        """One keyword parameter for each field."""
        hints = typing.get_type_hints(cls, include_extras=True)
        names = cls.names or [name for name in hints if name not in typing.get_type_hints(Group)]
        return [_parameter(name, hints[name], getattr(cls, name)) for name in names]

    @classmethod
    def build(cls, values: dict[str, Any]) -> Any:
        """The group's object, from what was typed."""
        given = {name: value for name, value in values.items() if value is not None}
        return given if cls.builds is None else getattr(mvar, cls.builds)(**given)


def signature(run: Command, **further: tuple[Any, Any]) -> inspect.Signature:
    """The signature of a command's function, with the fields of its groups in the groups' places.

    Args:
        run: The command's function.
        further: Annotation and default of options that all commands share.
    """
    hints = typing.get_type_hints(run, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(run).parameters.items():
        group = _group(hints[name])
        parameters += group.parameters() if group else [_parameter(name, hints[name], parameter.default)]
    return inspect.Signature([*parameters, *(_parameter(name, *option) for name, option in further.items())])


def grouped(run: Command, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a command's function, from the values of its flat signature."""
    for name, hint in typing.get_type_hints(run, include_extras=True).items():
        if group := _group(hint):
            values[name] = group.build({option.name: values.pop(option.name) for option in group.parameters()})
    return values


def _group(hint: Any) -> type[Group] | None:
    return hint if inspect.isclass(hint) and issubclass(hint, Group) else None


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
