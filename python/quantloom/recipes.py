"""Recipes: which format and rounding each linear layer of a model gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from quantloom import _checks
from quantloom.activations import ActivationFormat, activations_from_json, parse_activations
from quantloom.distillation import LayerDistillation, distillation_from_json, parse_distillation
from quantloom.formats import Format, Uniform, format_from_json, parse_format
from quantloom.rounding import Rounding, parse_rounding, rounding_from_json
from quantloom.transforms import Transform, parse_transform, transform_from_json

__all__ = ["Recipe"]

_VERSION = 1

# Linears of feed-forward parts, by the names that transformers gives their modules or the layers themselves.
_MLP = r"re:.*\.(mlp|feed_forward|ffn|block_sparse_moe)\..*|.*\.(fc1|fc2)"


def _check_pattern(argument: str, pattern: Any) -> str:
    _checks.string(argument, pattern, 'a module name or "re:" and a regular expression')
    if not pattern:
        raise ValueError(f'{argument}: got an empty string, expected a module name or "re:..."')
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(
                f"{argument}: got {pattern!r}, expected a regular expression ({error})"
            ) from None
    return pattern


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return pattern == name


@dataclass(frozen=True)
class Recipe:
    """A format and a rounding for all linear layers, with exceptions by name.

    Args:
        format: a ``Format`` or its short form (``"uniform:4:g128"``).
        rounding: ``Nearest(...)``, ``GPTQ(...)``, ``AWQ(...)``, ``SmoothQuant(...)`` or ``BeamSearch(...)``,
            without Hessians and inputs: calibration provides those.
        ignore: patterns of layers that stay as they are. A pattern is the full name of a module, or
            ``"re:"`` and a regular expression that matches the whole name.
        overrides: maps patterns to another format, or to None for layers that stay as they are. The
            first pattern that matches counts, and it goes before ``ignore``.
        transform: None, a ``Transform`` or its short form (``"hadamard:b128"``): the basis in which weights
            are quantized. Layers apply it to their inputs at run time.
        activations: None, an ``ActivationFormat`` or its short form (``"int8:token"``): how the inputs of
            quantized layers are rounded at run time. Calibration finds the scales of static formats.
        activation_overrides: maps patterns to another format of activations, or to None for exact ones; the
            first pattern that matches counts.
        distillation: None, a ``LayerDistillation`` or its short form (``"lkd:steps=100"``): every decoder
            layer is trained towards the original one when its weights are rounded.

    Raises TypeError or ValueError naming the argument.
    """

    format: Format
    rounding: Rounding = field(default_factory=lambda: parse_rounding("nearest"))
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: Mapping[str, Format | None] = field(default_factory=dict)
    transform: Transform | None = None
    activations: ActivationFormat | None = None
    activation_overrides: Mapping[str, ActivationFormat | None] = field(default_factory=dict)
    distillation: LayerDistillation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", parse_format(self.format))
        object.__setattr__(self, "rounding", parse_rounding(self.rounding))
        for name in ("hessian", "held_out", "output_hessian", "inputs", "maxima", "magnitudes"):
            if getattr(self.rounding, name, None) is not None:
                raise ValueError(f"rounding: got {name}, expected None in a recipe: calibration provides it")
        if isinstance(self.ignore, str) or not isinstance(self.ignore, Iterable):
            raise TypeError(f"ignore: got {_checks.type_name(self.ignore)}, expected a sequence of patterns")
        object.__setattr__(self, "ignore", tuple(_check_pattern("ignore", p) for p in self.ignore))
        if not isinstance(self.overrides, Mapping):
            raise TypeError(
                f"overrides: got {_checks.type_name(self.overrides)}, expected a mapping of patterns to"
                f" formats"
            )
        overrides = {
            _check_pattern("overrides", pattern): None if other is None else parse_format(other)
            for pattern, other in self.overrides.items()
        }
        object.__setattr__(self, "overrides", MappingProxyType(overrides))
        object.__setattr__(self, "transform", parse_transform(self.transform))
        name = json.loads(self.rounding.to_json())["rounding"]
        if name == "beam_search":
            from quantloom.beam_search import require_additive

            for form in (self.format, *filter(None, self.overrides.values())):
                require_additive(self.rounding, form)
        if self.transform is not None and name in ("awq", "smoothquant"):
            raise ValueError(
                f"transform: got {self.transform.spec}, expected None: {name} makes transforms of its own"
            )
        if self.activations is not None:
            object.__setattr__(self, "activations", parse_activations(self.activations))
        if not isinstance(self.activation_overrides, Mapping):
            given = _checks.type_name(self.activation_overrides)
            raise TypeError(f"activation_overrides: got {given}, expected a mapping of patterns to formats")
        overrides = {
            _check_pattern("activation_overrides", pattern): None
            if other is None
            else parse_activations(other)
            for pattern, other in self.activation_overrides.items()
        }
        object.__setattr__(self, "activation_overrides", MappingProxyType(overrides))
        object.__setattr__(self, "distillation", parse_distillation(self.distillation))

    @classmethod
    def parse(cls, format: str | Format, rounding: str | Rounding = "nearest", **settings: Any) -> Recipe:
        """A recipe of short forms: ``Recipe.parse("uniform:4:g128", "gptq")``.

        ``settings`` are ``ignore``, ``overrides``, ``transform``, ``activations``, ``activation_overrides``
        and ``distillation``.
        """
        return cls(parse_format(format), parse_rounding(rounding), **settings)

    @classmethod
    def zeroquant(
        cls,
        bits: int = 8,
        mlp_bits: int | None = None,
        activation_bits: int | None = 8,
        group_size: int | str = 128,
        distillation: LayerDistillation | str | None = None,
    ) -> Recipe:
        """The recipe of ZeroQuant (Yao et al., 2022): weights rounded to nearest on symmetric grids with a
        scale for each group of a row, activations with one for each token, found at run time.

        ``Recipe.zeroquant(8, 4)`` is its W4/8A8, with 4 bits for the MLPs and 8 for attention;
        ``distillation="lkd"`` adds its training layer by layer. Groups lie within rows, unlike those of its
        published code, which cuts the flattened matrix.

        Args:
            bits: of the weights, 1 to 8.
            mlp_bits: of those of MLPs (names with ``.mlp.``, ``.feed_forward.``, ``.ffn.`` or
                ``.block_sparse_moe.`` in them, or ``fc1`` and ``fc2``); None: `bits`.
            activation_bits: 2 to 8; None: activations stay exact.
            group_size: columns that share a scale, or ``"channel"``.
            distillation: None, a ``LayerDistillation`` or its short form.
        """
        mlp = {} if mlp_bits is None or mlp_bits == bits else {_MLP: Uniform(mlp_bits, group_size)}
        activations = None if activation_bits is None else ActivationFormat(activation_bits)
        return cls(
            Uniform(bits, group_size), overrides=mlp, activations=activations, distillation=distillation
        )

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A published recipe by its short form: ``zeroquant[:wBITS[/BITS]aBITS][:gN|:channel]``, such as
        ``"zeroquant:w4/8a8:g64"``, in which the first number is that of MLPs; a16 leaves activations exact.
        Without options ``"zeroquant:w8a8:g128"``.

        Raises ValueError for other names.
        """
        _checks.string("recipe", name, "a short form such as 'zeroquant:w8a8'")
        expected = "expected zeroquant[:wBITS[/BITS]aBITS][:gN|:channel], such as zeroquant:w4/8a8:g64"
        form = r"zeroquant(?::w([1-8])(?:/([1-8]))?a(16|[2-8]))?(?::(?:g([1-9][0-9]{0,8})|(channel)))?"
        found = re.fullmatch(form, name)
        if found is None:
            raise ValueError(f"recipe: got {name!r}, {expected}")
        first, second, activation_bits, group, channel = found.groups()
        return cls.zeroquant(
            int(second or first or 8),
            int(first or 8),
            None if activation_bits == "16" else int(activation_bits or 8),
            channel or int(group or 128),
        )

    def format_for(self, name: str) -> Format | None:
        """The format of the layer `name`; None if it stays as it is."""
        for pattern, other in self.overrides.items():
            if _matches(pattern, name):
                return other
        if any(_matches(pattern, name) for pattern in self.ignore):
            return None
        return self.format

    def activations_for(self, name: str) -> ActivationFormat | None:
        """How the inputs of the layer `name` are rounded; None: not at all."""
        for pattern, other in self.activation_overrides.items():
            if _matches(pattern, name):
                return other
        return self.activations

    def to_json(self) -> str:
        """The recipe as a JSON object; ``from_json`` reads it back. Equal recipes give equal text."""
        fields = {
            "version": _VERSION,
            "format": json.loads(self.format.to_json()),
            "rounding": json.loads(self.rounding.to_json()),
            "ignore": list(self.ignore),
            # A list, because the order of overrides counts.
            "overrides": [
                [pattern, None if other is None else json.loads(other.to_json())]
                for pattern, other in self.overrides.items()
            ],
        }
        if self.transform is not None:
            fields["transform"] = json.loads(self.transform.to_json())
        if self.activations is not None:
            fields["activations"] = json.loads(self.activations.to_json())
        if self.activation_overrides:
            fields["activation_overrides"] = [
                [pattern, None if other is None else json.loads(other.to_json())]
                for pattern, other in self.activation_overrides.items()
            ]
        if self.distillation is not None:
            fields["distillation"] = json.loads(self.distillation.to_json())
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises ValueError for unknown keys or another version."""
        fields = _checks.json_object("recipe", text)
        expected = {"version", "format", "rounding", "ignore", "overrides"}
        transform = fields.pop("transform", None)
        activations = fields.pop("activations", None)
        exceptions = fields.pop("activation_overrides", [])
        distillation = fields.pop("distillation", None)
        if set(fields) != expected:
            raise ValueError(f"recipe: got keys {sorted(fields)}, expected {sorted(expected)}")
        if fields["version"] != _VERSION:
            raise ValueError(f"recipe: got version {fields['version']!r}, expected {_VERSION}")
        overrides = fields["overrides"]
        for pairs in (overrides, exceptions):
            if not isinstance(pairs, list) or not all(isinstance(o, list) and len(o) == 2 for o in pairs):
                raise ValueError("recipe overrides: expected a list of pairs [pattern, format]")
        return cls(
            format_from_json(json.dumps(fields["format"])),
            rounding_from_json(json.dumps(fields["rounding"])),
            fields["ignore"],
            {p: None if other is None else format_from_json(json.dumps(other)) for p, other in overrides},
            None if transform is None else transform_from_json(json.dumps(transform)),
            None if activations is None else activations_from_json(json.dumps(activations)),
            {
                p: None if other is None else activations_from_json(json.dumps(other))
                for p, other in exceptions
            },
            None if distillation is None else distillation_from_json(json.dumps(distillation)),
        )

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_json() == other.to_json()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recipe.from_json, (self.to_json(),)
