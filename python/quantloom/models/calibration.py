"""Calibration: token windows, the inputs of the decoder blocks, Hessians of the stages inside a block.

One window is one forward pass, always: the arithmetic of a window depends neither on the other windows nor
on where a killed run was taken up again. All of it runs in float32. torch's own products may differ in the
last bit between numbers of torch threads, so results repeat exactly for the same number of torch threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quantloom as ql
from quantloom.evaluate import tokens
from quantloom.models.records import sync_folder
from quantloom.models.structure import Block

__all__ = [
    "BlockCall",
    "HiddenStates",
    "TokenWindows",
    "capture",
    "float_block",
    "gather_hessians",
    "run_block",
]


class _Stop(Exception):
    """Ends a forward pass once it has shown what was wanted."""


# -- tokens ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenWindows:
    """Token ids [windows, window]: the first `calibration` rows make Hessians, the others are held out."""

    ids: np.ndarray
    calibration: int

    @property
    def hash(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.ids, dtype="<i8").tobytes()).hexdigest()

    @classmethod
    def read(
        cls, source: Any, model_path: Path, config: Any, windows: int, window: int, held_out: int
    ) -> TokenWindows:
        """Consecutive windows from the start of a text file or of token ids.

        Raises ValueError naming the argument for too few tokens, ids outside the vocabulary and windows
        longer than the model's positions; OSError if the text or the tokenizer cannot be read.
        """
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and window > positions:
            raise ValueError(f"window: got {window}, expected at most the model's {positions} positions")
        wanted = (windows + held_out) * window
        if isinstance(source, (str, os.PathLike)) and str(source).endswith(".u16"):
            ids = tokens(model_path, source)
        elif isinstance(source, (str, os.PathLike)):
            ids = _text_tokens(Path(source), model_path, wanted)
        else:
            ids = _given_tokens(source)
        if ids.size < wanted:
            raise ValueError(
                f"calibration: got {ids.size} tokens, expected at least {wanted} "
                f"({windows} windows and {held_out} held out of {window} tokens)"
            )
        ids = ids[:wanted]
        vocabulary = config.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"calibration: got token ids from {ids.min()} to {ids.max()}, expected 0 to {vocabulary - 1}"
            )
        return cls(ids.reshape(windows + held_out, window), windows)


def _given_tokens(source: Any) -> np.ndarray:
    ids = np.asarray(source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source)
    if ids.dtype.kind not in "iu":
        raise TypeError(
            f"calibration: got ids of dtype {ids.dtype}, expected the path of a text file or integer ids"
        )
    if ids.ndim != 1:
        raise ValueError(f"calibration: got ids of shape {list(ids.shape)}, expected one dimension")
    return ids.astype(np.int64)


def _text_tokens(path: Path, model_path: Path, wanted: int) -> np.ndarray:
    from transformers import AutoTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"calibration: {path} is not a file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{model_path}: no usable tokenizer ({error}); pass token ids as calibration"
        ) from error
    # Tokenizers keep whole texts in memory: of a large file only a prefix is read, long enough that
    # cutting it leaves the wanted tokens as they are.
    size = path.stat().st_size
    length = max(wanted * 16, 1 << 20)
    while True:
        with open(path, "rb") as file:
            text = file.read(length)
        whole = len(text) >= size
        # A cut character at the end of a prefix is dropped; one inside the file is an error.
        try:
            decoded = text.decode("utf-8")
        except UnicodeDecodeError as error:
            if whole or error.start < len(text) - 3:
                raise ValueError(f"calibration: {path} is not UTF-8 text ({error})") from None
            decoded = text[: error.start].decode("utf-8")
        ids = tokenizer(decoded, add_special_tokens=False, verbose=False)["input_ids"]
        if whole or len(ids) >= wanted + 64:
            return np.asarray(ids, dtype=np.int64)
        length *= 4


# -- hidden states -----------------------------------------------------------------------------------


class HiddenStates:
    """Float32 hidden states [windows, window, hidden] in a file: one window is read or written at a time."""

    def __init__(self, path: Path, windows: int, window: int, hidden: int) -> None:
        self.path = path
        self.shape = (windows, window, hidden)
        self._bytes = window * hidden * 4

    def check(self) -> None:
        """Raises ValueError unless the file has the size that the shape asks for."""
        size = self.path.stat().st_size
        if size != self.shape[0] * self._bytes:
            expected = f"expected {self.shape[0] * self._bytes}; pass resume=False to start over"
            raise ValueError(f"{self.path}: got {size} bytes, {expected}")

    def read(self) -> Iterator[torch.Tensor]:
        """Yields the windows in order, each [1, window, hidden]."""
        with open(self.path, "rb", buffering=0) as file:
            for _ in range(self.shape[0]):
                array = np.empty((1, *self.shape[1:]), dtype=np.float32)
                view = memoryview(array).cast("B")
                filled = 0
                while filled < self._bytes:
                    count = file.readinto(view[filled:])
                    if not count:
                        raise ValueError(
                            f"{self.path}: ends early, expected {self.shape[0] * self._bytes} bytes"
                        )
                    filled += count
                yield torch.from_numpy(array)

    def window(self, index: int) -> torch.Tensor:
        """One window, [1, window, hidden]. Raises ValueError if the file ends before it."""
        array = np.fromfile(self.path, "<f4", self._bytes // 4, offset=index * self._bytes)
        if array.nbytes != self._bytes:
            expected = f"expected {self.shape[0] * self._bytes} bytes"
            raise ValueError(f"{self.path}: ends before window {index}, {expected}")
        return torch.from_numpy(array.reshape(1, *self.shape[1:]))

    @contextlib.contextmanager
    def writer(self) -> Iterator[Any]:
        """A function that appends one window; the file gets its name when the context ends well."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")

        with open(temporary, "wb") as file:

            def append(state: torch.Tensor) -> None:
                if tuple(state.shape) != (1, *self.shape[1:]):
                    raise RuntimeError(
                        f"hidden states: got shape {list(state.shape)}, expected {[1, *self.shape[1:]]}"
                    )
                array = state.detach().to("cpu", torch.float32).contiguous().numpy()
                file.write(memoryview(array).cast("B"))

            yield append
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)


# -- block inputs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCall:
    """How the model calls a block: everything but the hidden states, which come first or by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden_name: str | None  # None: the first positional argument

    def to(self, device: str) -> BlockCall:
        """The call with its tensors on a device."""
        return BlockCall(_moved(self.args, device), _moved(self.kwargs, device), self.hidden_name)

    def run(self, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        if self.hidden_name is None:
            out = block(hidden, *self.args, **self.kwargs)
        else:
            out = block(*self.args, **{self.hidden_name: hidden}, **self.kwargs)
        return out[0] if isinstance(out, (tuple, list)) else out


def run_block(block: Block, call: BlockCall, hidden: torch.Tensor) -> torch.Tensor:
    """The output of a block [1, window, hidden] in float32."""
    with torch.no_grad():
        out = call.run(block.module, hidden)
    if not isinstance(out, torch.Tensor) or out.shape != hidden.shape:
        got = list(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise RuntimeError(
            f"{block.name}: returned {got}, expected hidden states of shape {list(hidden.shape)}"
        )
    return out


def _moved(value: Any, device: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    return value


@contextlib.contextmanager
def float_block(block: torch.nn.Module, device: str = "cpu") -> Iterator[None]:
    """Holds the parameters of a module as float32 copies on a device, with its buffers, while the context
    lasts."""
    kept: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in block.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                kept.append((module._parameters, name, parameter))
                copy = parameter.detach().to(device, torch.float32, copy=True)
                module._parameters[name] = torch.nn.Parameter(copy, requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is None or str(buffer.device) == device:
                    continue
                kept.append((module._buffers, name, buffer))
                module._buffers[name] = buffer.to(device)
        yield
    finally:
        for owner, name, parameter in kept:
            owner[name] = parameter


def capture(
    model: torch.nn.Module, blocks: Sequence[Block], windows: TokenWindows, folder: Path, tick: Any = None
) -> tuple[list[BlockCall], int, Any]:
    """Runs the parts of the model before its blocks.

    Returns the call of each block, the hidden size, and a function that writes the hidden states entering
    block 0 (of all windows) to a ``HiddenStates``. Raises ValueError if blocks get inputs that depend on
    the tokens, apart from the hidden states: those calls could not be repeated.
    """
    probes = [torch.from_numpy(windows.ids[i : i + 1]) for i in (0, len(windows.ids) - 1)]
    with _outer_float32(model, blocks, folder), torch.no_grad():
        returns_tuple = _returns_tuple(model, blocks[0], probes[0])
        calls = _record_calls(model, blocks, probes[0], returns_tuple)
        again = _record_calls(model, blocks, probes[1], returns_tuple)
        for block, (_, first), (_, second) in zip(blocks, calls, again, strict=True):
            if not _equal((first.args, first.kwargs), (second.args, second.kwargs)):
                raise ValueError(
                    f"{block.name}: the model passes it inputs that depend on the tokens, besides the hidden "
                    "states; such models cannot be calibrated block by block"
                )
    hidden_size = calls[0][0].shape[-1]

    def write(states: HiddenStates) -> None:
        with _outer_float32(model, blocks, folder), torch.no_grad(), states.writer() as append:
            for row in windows.ids:
                append(_first_hidden(model, blocks[0], torch.from_numpy(row[None])))
                if tick is not None:
                    tick()

    return [call for _, call in calls], hidden_size, write


def _forward(model: torch.nn.Module, ids: torch.Tensor) -> None:
    with contextlib.suppress(_Stop):
        model(input_ids=ids, use_cache=False)


@contextlib.contextmanager
def _patched(block: Block, forward: Any) -> Iterator[None]:
    # On the instance: the block keeps its class and attributes, which model code may look at.
    block.module.forward = forward
    try:
        yield
    finally:
        del block.module.forward


def _returns_tuple(model: torch.nn.Module, block: Block, ids: torch.Tensor) -> bool:
    """Whether blocks return a tuple (hidden states first) or the hidden states alone."""
    original, seen = block.module.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(isinstance(original(*args, **kwargs), (tuple, list)))
        raise _Stop

    with float_block(block.module), _patched(block, forward):
        _forward(model, ids)
    if not seen:
        raise ValueError(f"{block.name}: the model never calls it, expected the first decoder block")
    return seen[0]


def _split_hidden(
    block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, BlockCall]:
    if args and isinstance(args[0], torch.Tensor):
        hidden, call = args[0], BlockCall(args[1:], dict(kwargs), None)
    elif isinstance(kwargs.get("hidden_states"), torch.Tensor):
        rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        hidden, call = kwargs["hidden_states"], BlockCall(args, rest, "hidden_states")
    else:
        raise ValueError(
            f"{block.name}: gets no hidden states as first argument or by the name hidden_states"
        )
    if hidden.ndim != 3 or hidden.shape[0] != 1:
        raise ValueError(
            f"{block.name}: got hidden states of shape {list(hidden.shape)}, expected [1, window, hidden]"
        )
    for value in (*call.args, *call.kwargs.values()):
        if type(value).__name__.endswith("Cache"):
            raise ValueError(
                f"{block.name}: gets a {type(value).__name__} although use_cache=False was asked for"
            )
    return hidden, call


def _record_calls(
    model: torch.nn.Module, blocks: Sequence[Block], ids: torch.Tensor, returns_tuple: bool
) -> list[tuple[torch.Tensor, BlockCall]]:
    calls: dict[int, tuple[torch.Tensor, BlockCall]] = {}

    def recorder(block: Block) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if block.index in calls:
                raise ValueError(f"{block.name}: the model calls it twice in one pass, expected once")
            hidden, call = _split_hidden(block, args, kwargs)
            calls[block.index] = (hidden, call)
            if block.index == len(blocks) - 1:
                raise _Stop
            return (hidden,) if returns_tuple else hidden

        return forward

    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(_patched(block, recorder(block)))
        _forward(model, ids)
    missing = [block.name for block in blocks if block.index not in calls]
    if missing:
        raise ValueError(
            f"{missing[0]}: the model never calls it, expected every block to run once, in order"
        )
    return [calls[index] for index in range(len(blocks))]


def _first_hidden(model: torch.nn.Module, block: Block, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(_split_hidden(block, args, kwargs)[0])
        raise _Stop

    with _patched(block, forward):
        _forward(model, ids)
    return seen[0]


@contextlib.contextmanager
def _outer_float32(model: torch.nn.Module, blocks: Sequence[Block], folder: Path) -> Iterator[None]:
    """Makes everything before the blocks compute in float32.

    Embeddings become float32 in a mapped temporary file, so that only the rows looked up are in memory;
    parameters on the meta device or of output heads never run here and stay as they are.
    """
    inside = {id(part) for block in blocks for part in block.module.modules()}
    heads = model.get_output_embeddings()
    kept: list[tuple[dict[str, Any], str, torch.nn.Parameter]] = []
    files: list[Path] = []
    try:
        for module in model.modules():
            if id(module) in inside or module is heads:
                continue
            for name, parameter in module._parameters.items():
                if parameter is None or parameter.dtype == torch.float32:
                    continue
                if isinstance(module, torch.nn.Embedding):
                    file = folder / f"embedding-{len(files)}.f32"
                    files.append(file)
                    copy = _mapped_float32(parameter, file)
                else:
                    copy = parameter.detach().to(torch.float32)
                kept.append((module._parameters, name, parameter))
                module._parameters[name] = torch.nn.Parameter(copy, requires_grad=False)
        yield
    finally:
        for owner, name, parameter in kept:
            owner[name] = parameter
        for file in files:
            file.unlink(missing_ok=True)


def _mapped_float32(parameter: torch.Tensor, file: Path) -> torch.Tensor:
    rows = max(1, (4 << 20) // max(1, parameter.shape[1] * 4))
    with open(file, "wb") as out:
        for start in range(0, parameter.shape[0], rows):
            out.write(memoryview(parameter[start : start + rows].detach().float().numpy()).cast("B"))
    mapped = torch.from_file(str(file), shared=False, size=parameter.numel(), dtype=torch.float32)
    return mapped.view(parameter.shape)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.shape == b.shape
            and a.dtype == b.dtype
            and bool(torch.equal(a, b))
        )
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and (a is b or a == b)


# -- Hessians ----------------------------------------------------------------------------------------


@dataclass
class InputRange:
    """The range of each input of some Linears, 0 included, in the basis of a transform (or None)."""

    transform: Any = None
    low: Any = 0.0
    high: Any = 0.0

    def add(self, x: torch.Tensor) -> None:
        """Takes note of inputs float32 ``[tokens, k]``."""
        if self.transform is not None:
            x = self.transform.rotate_input(x)
        low, high = torch.aminmax(x.cpu(), dim=0)
        zero = torch.zeros(())
        self.low = torch.minimum(low, torch.as_tensor(self.low)).minimum(zero)
        self.high = torch.maximum(high, torch.as_tensor(self.high)).maximum(zero)

    def calibrate(self, form: Any) -> Any:
        """An ``ActivationFormat`` with the outliers and the scale that it needs."""
        low, high = self.low, self.high
        if form.static_outliers and form.outlier_columns is None:
            form = form.outliers_of(torch.maximum(-low, high).numpy())
        if form.static and form.scale is None:
            kept = torch.ones(len(low), dtype=torch.bool)
            kept[list(form.outlier_columns or ())] = False
            form = form.with_range((low * kept).min().item(), (high * kept).max().item())
        return form


def settle_activations(
    packed: Any, weight: torch.Tensor, form: Any, span: InputRange | None, threads: int
) -> tuple[Any, Any]:
    """A packed Linear, with the columns of outliers in float16, and how its inputs are rounded, with what
    calibration found."""
    form = form if form.calibrated else span.calibrate(form)
    if form.outlier_columns:
        packed = ql.keep_columns(packed, weight, form.outlier_columns, threads)
    return packed, form


def gather_hessians(
    block: Block,
    call: BlockCall,
    states: HiddenStates,
    stage: tuple[str, ...],
    windows: TokenWindows,
    threads: int,
    tick: Any,
    device: str = "cpu",
    span: InputRange | None = None,
) -> tuple[Any, Any]:
    """The Hessians of a stage's input: of the calibration windows, and of those held out (or None).

    `span` gets the inputs of the calibration windows, if it is given.

    The block and its call are on `device`, the Hessians will be. Raises ValueError naming the module if its
    input is not finite, and on the CPU the window.
    """
    linear = block.linears[stage[0]]
    main = ql.Hessian(linear.in_features, device)
    held_out = ql.Hessian(linear.in_features, device) if len(windows.ids) > windows.calibration else None
    seen: list[torch.Tensor] = []

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    handle = linear.register_forward_pre_hook(hook)
    try:
        for index, hidden in enumerate(states.read()):
            with contextlib.suppress(_Stop):
                run_block(block, call, hidden.to(device))
            x = seen.pop().reshape(-1, linear.in_features).to(torch.float32).contiguous()
            target = main if index < windows.calibration else held_out
            try:
                target.add(x, threads=threads)
                if span is not None and index < windows.calibration:
                    span.add(x)
            except (ValueError, RuntimeError) as error:
                raise ValueError(f"{stage[0]}: its input in calibration window {index}: {error}") from error
            tick()
    finally:
        handle.remove()
    if device != "cpu":
        try:  # a device says on use what was wrong with the inputs
            main.diagonal()
            if held_out is not None:
                held_out.diagonal()
        except ValueError as error:
            raise ValueError(f"{stage[0]}: its input in the calibration windows: {error}") from error
    return main, held_out
