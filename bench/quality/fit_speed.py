"""Fits of tables and codebooks against the same steps in plain PyTorch, in one run on one machine.

    python bench/quality/fit_speed.py [--log2-samples 22] [--threads 2] [--device cuda] [-o speed.json]

The sample is Student's t with 10 degrees of freedom. Each pair starts from the same numbers and stops by the
same rule; ours is the best time of --repeats, everything included (the sort of a sample too). Prints a table
and the results of both sides, which must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantloom import _fitting


def best_time(work: Callable[[], Any], repeats: int, synchronize: Callable[[], None]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        result = work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def midpoints(table: torch.Tensor) -> torch.Tensor:
    return (table[1:] + table[:-1]) / 2


def plain_lloyd_max(x: torch.Tensor, table: torch.Tensor, threshold: float) -> tuple[torch.Tensor, int]:
    """A sweep looks at every value: bucketize, count, add up."""
    codes = torch.bucketize(x, midpoints(table))
    sweeps = 0
    while True:
        counts = torch.bincount(codes, minlength=len(table))
        sums = torch.zeros(len(table), dtype=torch.float64, device=x.device)
        sums.index_add_(0, codes, x.double())
        table = torch.where(counts > 0, sums / counts.clamp(min=1), table.double()).float().cummax(0).values
        before, codes = codes, torch.bucketize(x, midpoints(table))
        sweeps += 1
        if (codes != before).sum().item() <= threshold * x.numel():
            return table, sweeps


def plain_table_errors(x: torch.Tensor, tables: list[torch.Tensor], scales: list[float]) -> np.ndarray:
    errors = np.empty((len(tables), len(scales)))
    for t, table in enumerate(tables):
        for s, scale in enumerate(scales):
            decoded = table[torch.bucketize(x / scale, midpoints(table))] * scale
            errors[t, s] = (decoded - x).square().sum(dtype=torch.float64).item()
    return errors


def plain_nearest(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """argmin of |c|^2 - 2 x.c in chunks whose matrix of distances fits 256 MiB."""
    norms = centroids.square().sum(1)
    rows = max(1, 2**26 // len(centroids))
    return torch.cat([(norms - 2 * chunk @ centroids.T).argmin(1) for chunk in x.split(rows)])


def plain_kmeans(x: torch.Tensor, centroids: torch.Tensor, sweeps: int) -> torch.Tensor:
    codes = plain_nearest(x, centroids)
    for _ in range(sweeps):
        counts = torch.bincount(codes, minlength=len(centroids))
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=x.device)
        sums.index_add_(0, codes, x.double())
        means = (sums / counts.clamp(min=1)[:, None]).float()
        centroids = torch.where(counts[:, None] > 0, means, centroids)
        codes = plain_nearest(x, centroids)
    return centroids


def relative_error(error: float, total: float) -> float:
    return float(np.sqrt(error / total))


def scalar_cases(x: torch.Tensor, threads: int, repeats: int) -> list[dict[str, Any]]:
    total = x.double().square().sum().item()
    rows = []
    for bits in (3, 4):
        # The same start on both sides.
        start = torch.linspace(-3, 3, 2**bits)
        ours, fit = best_time(
            lambda start=start: _fitting.lloyd_max(
                _fitting.sort_values(x, threads=threads), len(start), start=start
            ),
            repeats,
            lambda: None,
        )
        plain, (table, sweeps) = best_time(
            lambda start=start: plain_lloyd_max(x, start, 1e-4), 1, lambda: None
        )
        plain_error = plain_table_errors(x, [table], [1.0]).item()
        rows.append(
            {
                "step": f"Lloyd-Max, {bits} bits",
                "seconds": ours,
                "plain_seconds": plain,
                "result": f"R {relative_error(fit.squared_error, total):.5f}, {fit.sweeps} sweeps",
                "plain_result": f"R {relative_error(plain_error, total):.5f}, {sweeps} sweeps",
            }
        )
    normal = torch.distributions.Normal(0.0, 1.0)
    for bits, tables, count in ((4, 1, 17), (4, 12, 9)):
        grid = torch.linspace(0, 1, 2**bits + 2)[1:-1]
        shapes = [normal.icdf(grid) * 3**0.5 * (1 + 0.05 * t) for t in range(tables)]
        scales = np.logspace(-2, 2, count, base=2).astype(np.float32).tolist()
        ours, errors = best_time(
            lambda shapes=shapes, scales=scales: _fitting.table_errors(
                _fitting.sort_values(x, threads=threads), shapes, scales, threads=threads
            ),
            repeats,
            lambda: None,
        )
        plain, plain_errors = best_time(
            lambda shapes=shapes, scales=scales: plain_table_errors(x, shapes, scales), 1, lambda: None
        )
        rows.append(
            {
                "step": f"search over {tables} tables x {count} scales, {bits} bits",
                "seconds": ours,
                "plain_seconds": plain,
                "result": f"least R {relative_error(errors.min(), total):.6f}",
                "plain_result": f"least R {relative_error(plain_errors.min(), total):.6f}",
            }
        )
    return rows


def vector_cases(
    x: torch.Tensor, threads: int, repeats: int, sweeps: int, synchronize: Callable[[], None]
) -> list[dict[str, Any]]:
    total = x.double().square().sum().item()
    rows = []
    for entries, d in ((64, 2), (4096, 4)):
        vectors = x.view(-1, d)
        start = vectors[:entries].clone()
        ours, fit = best_time(
            lambda v=vectors, s=start, k=entries: _fitting.kmeans(
                v, k, start=s, max_sweeps=sweeps, threshold=0.0, threads=threads
            ),
            repeats,
            synchronize,
        )
        plain, centroids = best_time(lambda v=vectors, s=start: plain_kmeans(v, s, sweeps), 1, synchronize)
        codes = plain_nearest(vectors, centroids)
        plain_error = (centroids[codes] - vectors).double().square().sum().item()
        rows.append(
            {
                "step": f"k-means, {entries} entries of {d}, {sweeps} sweeps",
                "seconds": ours,
                "plain_seconds": plain,
                "result": f"R {relative_error(fit.squared_error, total):.5f}",
                "plain_result": f"R {relative_error(plain_error, total):.5f}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2-samples", type=int, default=22)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="of the vector cases; scalar ones run on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sweeps", type=int, default=3, help="of each k-means")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(100)
    x = torch.distributions.StudentT(10.0).sample((2**arguments.log2_samples,))
    synchronize = torch.cuda.synchronize if arguments.device.startswith("cuda") else lambda: None
    rows = scalar_cases(x, arguments.threads, arguments.repeats)
    rows += vector_cases(
        x.to(arguments.device), arguments.threads, arguments.repeats, arguments.sweeps, synchronize
    )
    print(f"{x.numel()} samples, {arguments.threads} threads, vectors on {arguments.device}")
    print(f"{'step':44} {'quantloom':>10} {'PyTorch':>10} {'ratio':>7}")
    for row in rows:
        ratio = row["plain_seconds"] / row["seconds"]
        print(f"{row['step']:44} {row['seconds']:9.3f}s {row['plain_seconds']:9.3f}s {ratio:6.1f}x")
        print(f"    {row['result']}; PyTorch: {row['plain_result']}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
