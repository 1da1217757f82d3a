"""One sweep of beam search for additive codes against a direct PyTorch transcription of the published one.

    python bench/quality/beam_search_speed.py [--size 1024] [--formats additive:2x8:g8 ...] [--beams 1 4]

The transcription does what the publication says: for each block and table it scores every code of every group
of rows in one matrix, takes the best by topk, and makes the whole matrix anew from its codes. Some of its
steps, spread over the sweep, are timed with all hypotheses, and their mean taken for all. Both in float32,
in turns, best of the rounds.
"""

from __future__ import annotations

import argparse
import time


def matrix_of(codes, tables, scales):
    """Codes [n, blocks, tables] of blocks of one row; tables [tables, entries, g]."""
    count = codes.shape[2]
    total = sum(tables[m][codes[:, :, m]] for m in range(count))
    return scales * total.reshape(len(codes), -1)


def literal_step(w, h, tables, scales, codes, losses, block, table):
    """One step for `codes` [beam, n, blocks, tables] and `losses` [beam, n]; the best hypotheses after it."""
    import torch

    g = tables.shape[2]
    columns = slice(block * g, block * g + g)
    own = h[columns, columns]
    entries = tables[table]
    norms = ((entries @ own) * entries).sum(1)
    found, values = [], []
    for b in range(len(codes)):
        left = w - matrix_of(codes[b], tables, scales)
        old = entries[codes[b, :, block, table]]
        target = left @ h[:, columns] + scales * (old @ own)
        scores = scales.square() * norms - 2 * scales * (target @ entries.T)  # [n, entries]
        before = scores.gather(1, codes[b, :, block, table, None].long())
        best = (losses[b, :, None] + scores - before).topk(len(codes), dim=1, largest=False)
        values.append(best.values)
        found.append(best.indices)
    return torch.stack(values), torch.stack(found)


def literal_sweep(w, h, tables, scales, codes, beam, steps):
    """Seconds of a sweep, from `steps` of its steps."""
    import torch

    n, blocks, count = codes.shape
    spread = [round(i * (blocks * count - 1) / max(steps - 1, 1)) for i in range(steps)]
    states, losses = codes[None].repeat(beam, 1, 1, 1), torch.zeros(beam, n)
    begin = time.perf_counter()
    for step in spread:
        block, table = divmod(step, count)
        values, found = literal_step(w, h, tables, scales, states, losses, block, table)
        best = values.permute(1, 0, 2).reshape(n, -1).topk(beam, dim=1, largest=False)
        parents, rows = best.indices // beam, torch.arange(n)
        picked = found.permute(1, 0, 2).reshape(n, -1).gather(1, best.indices)
        states = torch.stack([states[parents[:, b], rows] for b in range(beam)])
        states[:, :, block, table] = picked.T.to(states.dtype)
        losses = best.values.T.contiguous()
    return (time.perf_counter() - begin) / len(spread) * blocks * count


def main() -> None:
    import numpy as np
    import quantloom as ql
    import torch
    from quantloom.beam_search import search_codes

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="rows and columns")
    parser.add_argument("--formats", nargs="+", default=["additive:2x8:g8"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=16, help="of the transcription, that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.size
    rng = np.random.default_rng(0)
    w = rng.standard_normal((size, size), dtype=np.float32)
    x = rng.standard_normal((2 * size, size), dtype=np.float32)
    x[:, 1:] += 0.5 * x[:, :-1]
    hessian = ql.Hessian(size)
    hessian.add(x)
    print("| format | beam | transcription, s | search_codes, s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for spec in arguments.formats:
        form = ql.parse_format(spec)
        q = ql.quantize(
            w, form, ql.BeamSearch(hessian, rounds=0, refit=0, sweeps=4), threads=arguments.threads
        )
        blocks = size // form.in_group
        raw = ql.layouts.to_aqlm(q)["codes"].view(np.uint8 if form.bits <= 8 else np.uint16)
        codes = torch.from_numpy(raw.reshape(size, blocks, form.codebooks).astype(np.int64))
        tables = torch.from_numpy(q.planes["codebook"][:, :, 0].astype(np.float32))
        scales = torch.from_numpy(q.planes["scales"].astype(np.float32))
        h = torch.from_numpy((hessian.sum() / hessian.tokens).astype(np.float32))
        for beam in arguments.beams:
            literal, ours = [], []
            for _ in range(arguments.rounds):
                literal.append(
                    literal_sweep(torch.from_numpy(w), h, tables, scales, codes, beam, arguments.steps)
                )
                begin = time.perf_counter()
                search_codes(w, q, hessian, beam=beam, threads=arguments.threads)
                ours.append(time.perf_counter() - begin)
            ratio = min(literal) / min(ours)
            print(f"| `{spec}` | {beam} | {min(literal):.2f} | {min(ours):.3f} | {ratio:.0f} |", flush=True)


if __name__ == "__main__":
    main()
