"""Settings: dataclasses whose types say what a field takes, and the one validator of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cache, wraps
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)


@dataclass(frozen=True)
class Range:
    """The numbers of a type: from `least` to `most`, or beyond `above`, or below `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Check a number."""
        inside = self.above is None or value > self.above
        inside = inside and (self.below is None or value < self.below)
        return inside and self.least <= value <= self.most

    def words(self, plain: str) -> str:
        """Put the type into words, given those of the type without this range."""
        if self.above is self.below is None and -math.inf < self.least <= self.most < math.inf:
            return f"{plain} from {self.least:g} to {self.most:g}"
        ends = [
            f"above {self.above:g}" if self.above is not None else f"of at least {self.least:g}",
            f"below {self.below:g}" if self.below is not None else f"at most {self.most:g}",
        ]
        return f"{plain} {' and '.join(end for end in ends if not end.endswith('inf'))}"


@dataclass(frozen=True)
class Kind:
    """The values of a type that pass a test, and what they are called."""

    name: str
    holds: Callable[[Any], bool]

    def words(self, plain: str) -> str:
        """Return the kind's name, which says what the plain type is."""
        return self.name


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
GateLogit = Annotated[float, Range(-20, 20)]
LayerList = Annotated[
    list[NonNegativeInt],
    Kind("a list of layer numbers (from 0, none twice)", lambda v: len(set(v)) == len(v)),
]


def fits(value: Any, hint: Any) -> bool:
    """Check `value` against a type with its constraints. An integer is a number too, a bool is
    neither; no list may be empty."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, option) for option in args)
    if origin is Annotated:
        rules = [rule for rule in args[1:] if isinstance(rule, (Range, Kind))]
        return fits(value, args[0]) and all(rule.holds(value) for rule in rules)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is list:
        return isinstance(value, list) and value != [] and all(fits(v, args[0]) for v in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return hint is Any or isinstance(value, (int, float) if hint is float else origin or hint)


def describe(hint: Any) -> str:
    """Put a type into words, as they follow "it must be": "an integer of at least 1 or None"."""
    *words, last = _alternatives(hint)
    return f"{', '.join(words)} or {last}" if words else last


_WORDS = {int: "an integer", float: "a number", str: "text", NoneType: "None", Any: "anything"}


def _alternatives(hint: Any) -> list[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [word for option in args for word in _alternatives(option)]
    if origin is Annotated:
        words = describe(args[0])
        for rule in args[1:]:
            words = rule.words(words) if isinstance(rule, (Range, Kind)) else words
        return [words]
    if origin is Literal:
        return [repr(option) for option in args]
    if origin is list:
        return [f"a list of one or more (each {describe(args[0])})"]
    return ["true", "false"] if hint is bool else [_WORDS.get(hint, "a mapping of keys")]


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
class Settings:
    """Base of checked settings: a subclass is a dataclass of keywords, and a field takes only what
    its type holds, when it is made and when it is assigned to.

    Methods named `validate_*` check what fields have to do with each other, and call `refuse`. They
    run when all fields are there; after an assignment `validate()` runs them again.

    Raises:
        ValueError: for a value that does not fit; names class, field, value and what is allowed.

    Example:
        >>> class Sizes(Settings):
        ...     width: PositiveInt = 64
        >>> Sizes(width=0)
        Traceback (most recent call last):
        ValueError: Sizes.width is 0; it must be an integer of at least 1.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclass(kw_only=True)(cls)
        hints = cls.types()
        for entry in fields(cls):
            # `strict` leaves a type that is text to the field's validator. By itself it knows no
            # `Annotated` and takes no integer for a number.
            entry.type = str(entry.type)
            check = {"validator": _validator(hints[entry.name])}
            entry.metadata = MappingProxyType({**entry.metadata, **check})
        strict(cls)
        for name in ("__setattr__", "validate"):
            setattr(cls, name, _plainly(getattr(cls, name)))

    @classmethod
    @cache  # annotations are compiled each time that they are looked at
    def types(cls) -> Mapping[str, Any]:
        """Return the type of each field, with its constraints."""
        hints = get_type_hints(cls, include_extras=True)
        return MappingProxyType({entry.name: hints[entry.name] for entry in fields(cls)})

    @classmethod
    def _called(cls, name: str) -> str:
        """Return what errors call a field."""
        return f"{cls.__name__}.{name}"

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raise the error of a field whose value does not go with the others.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self._called(name)} is {getattr(self, name)!r}; it must be {allowed}.")


def _validator(hint: Any) -> Callable[[Any], None]:
    def check(value: Any) -> None:
        if not fits(value, hint):
            raise ValueError(describe(hint))

    return check


def _plainly(method: Callable[..., None]) -> Callable[..., None]:
    """Raise a ValueError where `strict` raises errors of its own, which are none, take two lines
    and do not name the class."""

    @wraps(method)
    def run(self: Settings, *args: Any) -> None:
        try:
            method(self, *args)
        except StrictDataclassFieldValidationError as error:
            name, value = args
            text = f"{self._called(name)} is {value!r}; it must be {error.__cause__}."
            raise ValueError(text) from None
        except StrictDataclassClassValidationError as error:
            raise ValueError(str(error.__cause__)) from None

    return run
