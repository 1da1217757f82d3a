"""One sweep of beam search for additive codes against a direct PyTorch transcription of the published one.

    python bench/quality/beam_search_speed.py [--size 1024] [--formats additive:2x8:g8 ...] [--beams 1 4]
    python bench/quality/beam_search_speed.py --device cuda --size 4096 --formats additive:2x8:g8 \
        additive:1x16:g8 --beams 1 --layers --json FILE

The transcription does what the publication says: for each block and table it scores every code of every group
of rows in one matrix, takes the best by topk, and makes the whole matrix anew from its codes. Some of its
steps, spread over the sweep, are timed with all hypotheses, and their mean taken for all. Both in float32,
in turns, best of the rounds.

With --layers, whole layers of the sizes in a model of 7 billion weights: fit of tables, first codes and
rounds to the published end (one that gains less than 1%); and their sum over its 32 blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

# [out_features, in_features] and how many of them a block has.
LAYERS = (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1))
BLOCKS = 32


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


def wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def literal_sweep(w, h, tables, scales, codes, beam, steps):
    """Seconds of a sweep, from `steps` of its steps."""
    import torch

    n, blocks, count = codes.shape
    spread = [round(i * (blocks * count - 1) / max(steps - 1, 1)) for i in range(steps)]
    states, losses = codes[None].repeat(beam, 1, 1, 1), torch.zeros(beam, n, device=w.device)
    wait(w.device.type)
    begin = time.perf_counter()
    for step in spread:
        block, table = divmod(step, count)
        values, found = literal_step(w, h, tables, scales, states, losses, block, table)
        best = values.permute(1, 0, 2).reshape(n, -1).topk(beam, dim=1, largest=False)
        parents, rows = best.indices // beam, torch.arange(n, device=w.device)
        picked = found.permute(1, 0, 2).reshape(n, -1).gather(1, best.indices)
        states = torch.stack([states[parents[:, b], rows] for b in range(beam)])
        states[:, :, block, table] = picked.T.to(states.dtype)
        losses = best.values.T.contiguous()
    wait(w.device.type)
    return (time.perf_counter() - begin) / len(spread) * blocks * count


def make_layer(n: int, k: int, device: str):
    """Normal weights and a Hessian of inputs whose neighbours are alike."""
    import numpy as np
    import quantloom as ql
    import torch

    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(n, k, generator=generator, device=device)
    x = torch.randn(2 * k, k, generator=generator, device=device)
    x[:, 1:] += 0.5 * x[:, :-1].clone()
    hessian = ql.Hessian(k, device=device)
    hessian.add(x if device != "cpu" else np.asarray(x))
    return w, hessian


def compare(spec: str, arguments: argparse.Namespace) -> list[dict]:
    import numpy as np
    import quantloom as ql
    import torch
    from quantloom.beam_search import search_codes

    size, device = arguments.size, arguments.device
    w, hessian = make_layer(size, size, device)
    form = ql.parse_format(spec)
    q = ql.quantize(w, form, ql.BeamSearch(hessian, rounds=0, refit=0, sweeps=4), threads=arguments.threads)
    blocks = size // form.in_group
    on_cpu = ql.PackedTensor(q.format, q.shape, {name: plane.cpu() for name, plane in q.planes.items()})
    raw = np.asarray(ql.layouts.to_aqlm(on_cpu)["codes"])
    raw = raw.view(np.uint8 if form.bits <= 8 else np.uint16)
    codes = torch.from_numpy(raw.reshape(size, blocks, form.codebooks).astype(np.int64)).to(device)
    tables = q.planes["codebook"][:, :, 0].float()
    scales = q.planes["scales"].float()
    h = torch.as_tensor(hessian.sum() / hessian.tokens).float().to(device)
    rows = []
    for beam in arguments.beams:
        literal, ours = [], []
        for _ in range(arguments.rounds):
            literal.append(literal_sweep(w, h, tables, scales, codes, beam, arguments.steps))
            begin = time.perf_counter()
            search_codes(w, q, hessian, beam=beam, threads=arguments.threads)
            wait(device)
            ours.append(time.perf_counter() - begin)
        row = {"format": spec, "n": size, "k": size, "beam": beam, "steps_timed": arguments.steps}
        row |= {"steps": blocks * form.codebooks, "transcription_s": min(literal), "search_s": min(ours)}
        row["ratio"] = row["transcription_s"] / row["search_s"]
        print(
            f"| `{spec}` | {beam} | {min(literal):.2f} | {min(ours) * 1e3:.2f} | {row['ratio']:.0f} |",
            flush=True,
        )
        rows.append(row)
    return rows


def time_layers(spec: str, arguments: argparse.Namespace) -> dict:
    """Seconds of whole layers, and of all of a model."""
    import quantloom as ql

    rows, seconds = [], 0.0
    for (n, k), count in LAYERS:
        w, hessian = make_layer(n, k, arguments.device)
        wait(arguments.device)
        begin = time.perf_counter()
        q = ql.quantize(w, spec, ql.BeamSearch(hessian), threads=arguments.threads)
        wait(arguments.device)
        row = {"n": n, "k": k, "s": time.perf_counter() - begin, "losses": list(q.report.losses)}
        row["rounds"] = len(row["losses"]) - 1
        rows.append(row)
        seconds += BLOCKS * count * row["s"]
        gain = row["losses"][-1] / row["losses"][0]
        print(f"`{spec}` [{n}, {k}]: {row['s']:.2f} s, {row['rounds']} rounds, loss x {gain:.3f}", flush=True)
    print(f"`{spec}`: all layers of {BLOCKS} blocks: {seconds / 60:.1f} minutes", flush=True)
    return {"format": spec, "layers": rows, "model_s": seconds}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="rows and columns")
    parser.add_argument("--formats", nargs="+", default=["additive:2x8:g8"])
    parser.add_argument("--beams", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--steps", type=int, default=16, help="of the transcription, that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", action="store_true", help="whole layers, too")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cpu" if arguments.device == "cpu" else torch.cuda.get_device_name()
    report = {"device": device, "torch": torch.__version__, "sweeps": [], "layers": []}
    print("| format | beam | transcription, s | search_codes, ms | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for spec in arguments.formats:
        report["sweeps"] += compare(spec, arguments)
    for spec in arguments.formats if arguments.layers else ():
        report["layers"].append(time_layers(spec, arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
