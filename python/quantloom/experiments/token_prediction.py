"""Token prediction: cross-entropy and top-k KL divergence of quantized models, as runs of an experiment.

>>> model = E.RequantisableModel.load("path/to/model")
>>> data = token_prediction.Dataset.load(model.model, "valid.txt", sequence_length=512, batch_size=4)
>>> test = token_prediction.QuantiseFixed(F.Scaled(3, "int", Q.BFLOAT16, (None, None), "rms",
compressor="optimal"))
>>> token_prediction.run_sweep([token_prediction.Run("direct-cast", test, "path/to/model", "valid.txt")])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from quantloom import _checks
from quantloom import model_quantisation as M
from quantloom.experiments import store, sweeping
from quantloom.experiments.requantising import RequantisableModel

__all__ = [
    "Baseline",
    "Dataset",
    "PerturbEachParam",
    "QuantiseEachParam",
    "QuantiseFixed",
    "QuantiseHeuristic",
    "QuantiseVariable",
    "Run",
    "Test",
    "run_sweep",
]

SEED = 120081
MIN_TAIL = 1e-6


@dataclass
class Dataset:
    """Sequences of tokens, and what the reference model predicts after each position.

    A sequence is the beginning-of-sequence token and `sequence_length` - 1 tokens of text. The last batch is
    filled up with sequences that `masks` excludes. Of the reference's predictions the `kl_topk` most likely
    tokens are kept, with the natural logarithms of their probabilities.
    """

    name: str
    tokens: Tensor
    """int64 [n_batch, batch_size, sequence_length - 1]"""
    masks: Tensor
    """bool [n_batch, batch_size]"""
    bos_token_id: int
    topk_indices: Tensor
    """int64 [n_batch, batch_size, sequence_length, kl_topk]"""
    topk_logp: Tensor
    """float32, the same shape"""

    def __repr__(self) -> str:
        return f"Dataset({self.name}, ({self.n_batch}, {self.batch_size}, {self.sequence_length}))"

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def n_batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[1]

    @property
    def sequence_length(self) -> int:
        return self.tokens.shape[2] + 1

    @property
    def kl_topk(self) -> int:
        return self.topk_indices.shape[-1]

    @classmethod
    def load(
        cls,
        model: nn.Module,
        text: str | Path | np.ndarray | Tensor,
        sequence_length: int = 512,
        batch_size: int = 4,
        kl_topk: int = 128,
        sequence_limit: int | None = None,
        seed: int = SEED,
        bos_token_id: int | None = None,
        progress: bool = False,
    ) -> Dataset:
        """Cuts a text into sequences, shuffles them, and asks the reference model for its predictions.

        Args:
            model: the reference, a causal language model of transformers.
            text: a file, tokenized as `quantloom.evaluate.tokens` does with the tokenizer in the model's
                folder, or token ids [tokens]. An unfinished sequence at the end is dropped.
            kl_topk: tokens kept for each prediction, at most the vocabulary; 0 skips the reference.
            sequence_limit: sequences kept after the shuffle.
            seed: of the shuffle.
            bos_token_id: None: that of the model's config.

        Raises ValueError for a text shorter than one sequence and for a model without beginning-of-sequence
        token.
        """
        _checks.integer("sequence_length", sequence_length, 2)
        _checks.integer("batch_size", batch_size, 1)
        _checks.integer("kl_topk", kl_topk, 0)
        if sequence_limit is not None:
            _checks.integer("sequence_limit", sequence_limit, 1)
        config = getattr(model, "config", None)
        if bos_token_id is None:
            bos_token_id = getattr(config, "bos_token_id", None)
        if bos_token_id is None:
            raise ValueError("bos_token_id: got None and the model's config has none, expected a token id")
        vocabulary = getattr(config, "vocab_size", None)
        if vocabulary is not None and kl_topk > vocabulary:
            raise ValueError(f"kl_topk: got {kl_topk}, expected at most the vocabulary of {vocabulary}")
        name, ids = _token_ids(model, text)
        device = next(model.parameters()).device
        width = sequence_length - 1
        count = ids.numel() // width
        if count == 0:
            raise ValueError(f"text: got {ids.numel()} tokens, expected at least {width} for a sequence")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")[
            :sequence_limit
        ]
        sequences = ids[: count * width].view(count, width)[order].to(device)
        count = sequences.shape[0]
        filling = -count % batch_size
        tokens = nn.functional.pad(sequences, (0, 0, 0, filling), value=bos_token_id)
        tokens = tokens.view(-1, batch_size, width)
        masks = (torch.arange(count + filling, device=device) < count).view(-1, batch_size)
        shape = (*masks.shape, sequence_length, kl_topk)
        data = cls(
            name,
            tokens,
            masks,
            bos_token_id,
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.float32, device=device),
        )
        if kl_topk:
            with torch.no_grad():
                for index in store._tracked(list(range(data.n_batch)), "reference", progress):
                    predictions = data.logits(model, index).float().log_softmax(-1)
                    data.topk_logp[index], data.topk_indices[index] = predictions.topk(kl_topk)
        return data

    def logits(self, model: nn.Module, index: int) -> Tensor:
        """What `model` says to batch `index`: [batch_size, sequence_length, vocabulary]."""
        inputs = nn.functional.pad(self.tokens[index], (1, 0), value=self.bos_token_id)
        return model(input_ids=inputs, use_cache=False).logits

    def batch_losses(self, model: nn.Module, index: int) -> dict[str, Tensor]:
        """The mean over tokens, for each sequence of a batch that counts, float32 [sequences]:

        - ``cross_entropy``: of the text's tokens, in nats
        - ``kl_div``: KL(reference || model) with everything outside the reference's top-k tokens taken as one
          more token, whose probability is not taken below 1e-6. Left out if the dataset has no top-k tokens.
        """
        tokens, mask = self.tokens[index], self.masks[index]
        logp = self.logits(model, index).float().log_softmax(-1)
        text = logp[:, :-1].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        losses = {"cross_entropy": -text.mean(-1)[mask]}
        if self.kl_topk:
            expected = self.topk_logp[index].double()
            actual = logp.gather(-1, self.topk_indices[index]).double()
            tail = (1 - expected.exp().sum(-1)).clip(min=MIN_TAIL)
            actual_tail = (1 - actual.exp().sum(-1)).clip(min=MIN_TAIL)
            kl = (expected.exp() * (expected - actual)).sum(-1) + tail * (tail.log() - actual_tail.log())
            losses["kl_div"] = kl.mean(-1)[mask].float()
        return losses

    def evaluate(self, model: nn.Module) -> dict[str, Tensor]:
        """`batch_losses` of all batches, one value for each sequence, without gradients or dropout."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                losses = [self.batch_losses(model, index) for index in range(self.n_batch)]
        finally:
            model.train(training)
        return {key: torch.cat([batch[key] for batch in losses]) for key in losses[0]}


def _token_ids(model: nn.Module, text: Any) -> tuple[str, Tensor]:
    if isinstance(text, (np.ndarray, Tensor)):
        ids = torch.as_tensor(text, device="cpu")
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"text: got {ids.dtype} {list(ids.shape)}, expected integers [tokens]")
        return "tokens", ids.to("cpu", torch.int64)
    from quantloom import evaluate

    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not folder:
        raise ValueError("text: the model does not know its folder, which has the tokenizer; give token ids")
    return Path(text).name, torch.from_numpy(evaluate.tokens(folder, text))


@dataclass
class Test:
    """One run on a model, or several with different arguments."""

    def to_config(self) -> dict[str, Any]:
        """The settings, as the run's config has them; formats also in their short form."""
        config = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        if "fmt" in config:
            config["fmt_str"] = str(config["fmt"])
        return config

    def args(self, model: RequantisableModel | None) -> list[dict[str, Any]]:
        """The arguments of each run; `model` is None for tests that do not override this."""
        return [{}]

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        """What a run measured."""
        raise NotImplementedError


Test.__test__ = False  # pytest takes it for a test otherwise


@dataclass
class Baseline(Test):
    """The model as it is."""

    type: str = "baseline"

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        return data.evaluate(model.model)


@dataclass
class QuantiseFixed(Test):
    """All matrices in one format (`quantise_2d_fixed`).

    `error_weight`: None; "fisher" weighs errors by the diagonal that `fisher.record_fisher` stored in the
    experiment `fisher_experiment`, "parameter" by the weights' magnitudes.
    `encoded`: measure what decodes from the bytes that each matrix is stored in, and count them.
    """

    fmt: M.FmtSpec
    error_weight: Literal["fisher", "parameter"] | None = None
    fisher_experiment: str = "fisher"
    encoded: bool = False
    type: str = "quantise_fixed"

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        log = self._quantise(model, self._weights(model))
        for entry in log["params"].values():
            entry.pop("encoded", None)  # the bytes themselves are no part of the record
        return {**log, **data.evaluate(model.model)}

    def _quantise(self, model: RequantisableModel, weights: dict[str, Tensor] | None) -> dict[str, Any]:
        return M.quantise_2d_fixed(model.model, self.fmt, error_weight=weights, encoded=self.encoded)

    def _weights(self, model: RequantisableModel) -> dict[str, Tensor] | None:
        if self.error_weight is None:
            return None
        _checks.choice("error_weight", self.error_weight, ("fisher", "parameter"))
        if self.error_weight == "parameter":
            return {name: value.detach().abs() for name, value in model.model.named_parameters()}
        from quantloom.experiments import fisher

        return fisher.fetch_fisher(self.fisher_experiment, str(model.path), model.device)


@dataclass
class QuantiseVariable(QuantiseFixed):
    """Bits by each matrix's Fisher information (`quantise_2d_variable`)."""

    min_element_bits: float | None = None
    type: str = "quantise_variable"

    def _quantise(self, model: RequantisableModel, weights: dict[str, Tensor] | None) -> dict[str, Any]:
        from quantloom.experiments import fisher

        sums = fisher.fetch_fisher_sum(self.fisher_experiment, str(model.path))
        return M.quantise_2d_variable(
            model.model,
            self.fmt,
            fisher_sum=sums,
            min_element_bits=self.min_element_bits,
            error_weight=weights,
            encoded=self.encoded,
        )


@dataclass
class QuantiseHeuristic(QuantiseFixed):
    """More bits for some names and for the first and last layers (`quantise_2d_heuristic`)."""

    highp_add_bits: float = 2
    highp_names: tuple[str, ...] = ("embed_tokens", "lm_head")
    highp_first_layers: int = 2
    highp_last_layers: int = 2
    type: str = "quantise_heuristic"

    def _quantise(self, model: RequantisableModel, weights: dict[str, Tensor] | None) -> dict[str, Any]:
        return M.quantise_2d_heuristic(
            model.model,
            self.fmt,
            highp_add_bits=self.highp_add_bits,
            highp_names=self.highp_names,
            highp_first_layers=self.highp_first_layers,
            highp_last_layers=self.highp_last_layers,
            error_weight=weights,
            encoded=self.encoded,
        )


def _each_matrix(model: RequantisableModel) -> list[dict[str, Any]]:
    return [{"parameter": name} for name, _ in M.named_matrices(model.model)]


@dataclass
class QuantiseEachParam(Test):
    """One matrix at a time, the others as they are."""

    fmt: M.FmtSpec
    type: str = "quantise_each_param"

    def args(self, model: RequantisableModel | None) -> list[dict[str, Any]]:
        return _each_matrix(model)

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        parameter = model.model.get_parameter(args["parameter"])
        try:
            M.quantise_parameter_(parameter, self.fmt)
            return {**parameter._quantised, **data.evaluate(model.model)}
        finally:
            model.reset_parameter(args["parameter"])


@dataclass
class PerturbEachParam(Test):
    """Noise of `scale` times the RMS on one matrix at a time."""

    scale: float
    distribution: Literal["normal"] = "normal"
    seed: int = 0
    type: str = "perturb_each_param"

    def args(self, model: RequantisableModel | None) -> list[dict[str, Any]]:
        return _each_matrix(model)

    def run(self, model: RequantisableModel, data: Dataset, **args: Any) -> dict[str, Any]:
        _checks.choice("distribution", self.distribution, ("normal",))
        parameter = model.model.get_parameter(args["parameter"])
        generator = torch.Generator(parameter.device).manual_seed(self.seed)
        rms = parameter.detach().float().square().mean().sqrt()
        try:
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
                parameter.copy_(parameter.float() + noise * rms * self.scale)
            return {"rms": float(rms), **data.evaluate(model.model)}
        finally:
            model.reset_parameter(args["parameter"])


@dataclass
class Run:
    """A test of a model (a folder) on a text (a file)."""

    experiment: str
    test: Test
    model: str
    text: str
    sequence_length: int = 512
    kl_topk: int = 128
    batch_size: int = 4
    sequence_limit: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    type: str = "token_prediction"


def run_sweep(
    runs: Iterable[Run],
    processes: int | None = None,
    resume: bool = True,
    progress: bool = False,
    folder: str | Path | None = None,
) -> list[store.AttrDict]:
    """Runs all tests as runs of their experiments; see `experiments.run_sweep`.

    A record's config has the fields of `Run`, with the test's settings under ``test``, and its summary what
    the test measured: ``bits_per_param``, ``params``, and one value for each sequence in ``cross_entropy``
    and ``kl_div``.
    """
    configs = []
    for run in runs:
        if not isinstance(run, Run):
            raise TypeError(f"runs: got {_checks.type_name(run)}, expected token_prediction.Run")
        fields = {item.name: getattr(run, item.name) for item in dataclasses.fields(run)}
        needs_model = type(run.test).args is not Test.args
        model = RequantisableModel.load(run.model) if needs_model else None
        configs += [{**fields, **args} for args in run.test.args(model)]
    return sweeping.run_sweep(
        _Runner, configs, processes=processes, resume=resume, progress=progress, folder=folder
    )


class _Runner:
    """Keeps the model and the data from one run to the next while they are the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._model: RequantisableModel | None = None
        self._data: Dataset | None = None

    def __call__(self, config: store.AttrDict, experiment: store.Experiment) -> dict[str, Any]:
        model, data = self._load(config)
        args = {"parameter": config.parameter} if "parameter" in config else {}
        result = config.test.run(model, data, **args)
        return {key: value for key, value in result.items() if key != "fmt"}

    def _load(self, config: store.AttrDict) -> tuple[RequantisableModel, Dataset]:
        text = ("text", "sequence_length", "batch_size", "kl_topk", "sequence_limit")
        key = tuple(config[name] for name in ("model", "dtype", "device", *text))
        if key != self._key:
            self._key = self._model = self._data = None  # frees the old ones before the new ones come
            dtype = getattr(torch, _checks.choice("dtype", config.dtype, ("float32", "bfloat16", "float16")))
            self._model = RequantisableModel.load(config.model, config.device, dtype)
            self._data = Dataset.load(self._model.model, **{name: config[name] for name in text})
            self._key = key
        self._model.reset()
        return self._model, self._data
