"""Times what formats do to a matrix against the same steps in plain PyTorch, one after the other.

    python bench/quality/format_speed.py [--log2-samples 22] [--threads 1] [--repeats 5]

Prints a table in Markdown: milliseconds of the best of some repetitions, and their ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import quantloom.fit as F
import quantloom.formats as Q
import torch

BLOCK = 64


def best_ms(repeats: int, run: Callable[[], object]) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


class Plain:
    """Block absmax scales in bfloat16 and nearest values of a table, in torch operations."""

    def __init__(self, table: Q.LUTFormat, high: float | None = None) -> None:
        self.values = torch.tensor(table.centroids)
        self.middles = (self.values[1:] + self.values[:-1]) / 2
        self.high = table.range[1] if high is None else high

    def scaled(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = w.reshape(-1, BLOCK)
        scale = (blocks.abs().amax(1, keepdim=True) / self.high).bfloat16().float()
        return blocks / scale, scale

    def quantise(self, w: torch.Tensor) -> torch.Tensor:
        x, scale = self.scaled(w)
        return (self.values[torch.bucketize(x, self.middles)] * scale).reshape(w.shape)

    def encode(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, scale = self.scaled(w)
        codes = torch.bucketize(x, self.middles, out_int32=True).to(torch.uint8).reshape(-1, 2)
        return codes[:, 0] | codes[:, 1] << 4, scale.bfloat16()

    def decode(self, encoded: tuple[torch.Tensor, torch.Tensor], shape: torch.Size) -> torch.Tensor:
        packed, scale = encoded
        codes = torch.stack((packed & 15, packed >> 4), 1).reshape(-1, BLOCK)
        return (self.values[codes.long()] * scale.float()).reshape(shape)

    def error(self, w: torch.Tensor, factor: float) -> float:
        x, scale = self.scaled(w)
        q = self.values[torch.bucketize(x / factor, self.middles)] * factor * scale
        return float((q.reshape(w.shape) - w).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--log2-samples", type=int, default=22)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; set OMP_NUM_THREADS to the same")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2 ** (options.log2_samples // 2), 2 ** -(-options.log2_samples // 2), generator=generator)

    nf4 = Q.LinearScalingFormat(Q.NF4, Q.BFLOAT16, (1, BLOCK), "absmax")
    plain = Plain(Q.NF4)
    if not nf4.quantise(w).equal(plain.quantise(w)):
        raise SystemExit("format_speed: the two do not compute the same")
    encoded, plain_encoded = nf4.encode(w), plain.encode(w)
    student = Q.crd_block_t(4, BLOCK, 7)
    one = F.Scaled(4, "t", Q.BFLOAT16, (1, BLOCK), "absmax", args={"df": 7})
    twelve = F.Scaled(4, "t", Q.BFLOAT16, (1, BLOCK), "absmax")
    tables = [Plain(Q.crd_block_t(4, BLOCK, df)) for df in F._STUDENT_DF]
    rows = [
        ("quantise, NF4 in blocks of 64", lambda: nf4.quantise(w), lambda: plain.quantise(w)),
        ("encode the same to bytes", lambda: nf4.encode(w), lambda: plain.encode(w)),
        ("decode", encoded.decode, lambda: plain.decode(plain_encoded, w.shape)),
        (
            "scale search, 17 factors of one table",
            lambda: one.fit(w),
            lambda: min(F._FACTORS, key=lambda factor: Plain(student).error(w, factor)),
        ),
        (
            "Student-t fit, 17 factors of 12 tables",
            lambda: twelve.fit(w),
            lambda: min(table.error(w, factor) for table in tables for factor in F._FACTORS),
        ),
    ]
    print("| step | quantloom, ms | plain PyTorch, ms | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for place, (name, ours, theirs) in enumerate(rows):
        slow_repeats = 1 if place == len(rows) - 1 else options.repeats
        mine, other = best_ms(options.repeats, ours), best_ms(slow_repeats, theirs)
        print(f"| {name} | {mine:.1f} | {other:.0f} | {other / mine:.1f} × |", flush=True)


if __name__ == "__main__":
    main()
