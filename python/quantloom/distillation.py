"""Settings of layer-by-layer distillation, a step of model quantization after rounding."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from quantloom import _checks

__all__ = ["LayerDistillation", "distillation_from_json", "parse_distillation"]

_DEFAULT_STEPS = 100


@dataclass(frozen=True)
class LayerDistillation:
    """Trains each decoder layer, once its weights are rounded, towards the outputs of the original layer
    (layer-by-layer knowledge distillation, LKD: Yao et al., ZeroQuant, 2022).

    The loss is ``mean (student(h) - teacher(h))**2 / mean (teacher(h) - h)**2`` over the tokens of
    calibration windows, h being the hidden states that enter the layer: the share of what the layer adds to
    them that is wrong. All of the layer is trained: the quantized weights, rounded in every step to the
    scales that are stored (the gradient passes straight through), and biases and norms, rounded to the
    model's dtype. Of ``Additive`` formats tables and scales are trained instead, and codes stay (the block
    fine-tuning of AQLM: Egiazarian et al., 2024). Inputs are rounded as at run time. AdamW takes steps of
    ``rate * sqrt(loss at the start) * rms(tensor)``, falling to 0: in proportion to the error that there is
    to mend, so that one rate serves all layers and numbers of bits. Held-out windows choose the step whose
    weights are kept; if none of them is better there than the start, the start is kept. Any rounding may
    come before; formats are ``Additive``, and ``Uniform``, ``Codebook`` and ``SDR``, perhaps with
    ``Outliers``, which keep their values.

    Args:
        steps: of AdamW, for each layer; at least 1. More of them are not always better: with 200 of two
            windows a small model was further from the original than with 100 of one.
        batch: windows in a step; at least 1.
        rate: > 0, see above.
        weight_decay: of the weights, not of tables, scales, biases and norms; >= 0, relative to a step of the
            optimizer.
        inputs: ``"teacher"``: h comes from the layers of the original; ``"student"``: from those before as
            they are stored, with exact activations, as calibration has them; ``"both"``: the rounded layer
            gets the student's and the original one the teacher's, so that it mends errors of those before
            as well. On small models the last had a KL divergence 7 to 9% below the first with weights
            rounded to nearest at 3 and 4 bits, 3 to 4% below after error feedback at 2 and 3, and a higher
            one with activations of 4 bits, whose errors it does not see.
        checks: evaluations on the held-out windows, evenly spread over the steps; at least 1.
        seed: of the order of windows; below 2**32.

    Raises TypeError or ValueError naming the argument.
    """

    steps: int = _DEFAULT_STEPS
    batch: int = 1
    rate: float = 0.02
    weight_decay: float = 1e-5
    inputs: str = "teacher"
    checks: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch", 1), ("checks", 1), ("seed", 0)):
            object.__setattr__(self, name, _checks.integer(name, getattr(self, name), low))
        for name in ("rate", "weight_decay"):
            object.__setattr__(self, name, _checks.real(name, getattr(self, name)))
        if self.seed >= 2**32:
            raise ValueError(f"seed: got {self.seed}, expected an integer below 2**32")
        if not self.rate > 0:
            raise ValueError(f"rate: got {self.rate}, expected a number > 0")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected a number >= 0")
        _checks.choice("inputs", self.inputs, ("teacher", "student", "both"))

    @property
    def spec(self) -> str:
        """The short form, which ``parse_distillation`` reads back."""
        default, options = LayerDistillation(), ["lkd"]
        for item in fields(self):
            value = getattr(self, item.name)
            if value != getattr(default, item.name):
                options.append(f"{item.name.replace('_', '-')}={value}")
        return ":".join(options)

    def to_json(self) -> str:
        """The whole description; ``distillation_from_json`` reads it back."""
        return json.dumps({"distillation": "lkd"} | asdict(self), sort_keys=True, separators=(",", ":"))


def distillation_from_json(text: str) -> LayerDistillation:
    """Reads ``LayerDistillation.to_json`` back. Raises ValueError for unknown names and keys."""
    settings = _checks.json_object("distillation", text)
    expected = {"distillation"} | {item.name for item in fields(LayerDistillation)}
    if settings.keys() != expected:
        raise ValueError(f"distillation: got keys {sorted(settings)}, expected {sorted(expected)}")
    if settings.pop("distillation") != "lkd":
        raise ValueError(f"distillation: got {text!r}, expected a description of lkd")
    return LayerDistillation(**settings)


def parse_distillation(spec: Any) -> LayerDistillation | None:
    """The settings of a short form, ``lkd[:steps=N][:batch=N][:rate=X][:weight-decay=X][:inputs=student|both]
    [:checks=N][:seed=N]``; None for None and ``"none"``; a ``LayerDistillation`` is returned as it is.

    Raises ValueError naming what was not understood.
    """
    if spec is None or isinstance(spec, LayerDistillation):
        return spec
    _checks.string("distillation", spec, "None, a LayerDistillation or a short form such as 'lkd'")
    if spec == "none":
        return None
    name, *options = spec.split(":")
    if name != "lkd":
        raise ValueError(f"distillation: got {spec!r}, expected none, or lkd with options after colons")
    kinds = {item.name: type(item.default) for item in fields(LayerDistillation)}
    settings: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        key = key.replace("-", "_")
        try:
            settings_of_option = {key: kinds[key](value)}
        except (KeyError, ValueError):
            known = ", ".join(f"{name.replace('_', '-')}=" for name in kinds)
            raise ValueError(f"distillation: got option {option!r} in {spec!r}, expected {known}") from None
        if key in settings:
            raise ValueError(f"distillation: got option {key!r} twice in {spec!r}")
        settings |= settings_of_option
    return LayerDistillation(**settings)
