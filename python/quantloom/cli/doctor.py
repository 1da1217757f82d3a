"""`quantloom doctor`."""

from __future__ import annotations

import typer

from quantloom.cli import common


@common.reports_errors
def doctor(json: common.Json = False, traceback: common.Traceback = False) -> None:
    """Show versions, processor, GPUs and the kernel for each format, and check that they work.

    Every format is quantized, decoded and multiplied on a small random matrix, and compared with NumPy.
    Exit code 0 if all is well, 1 if a check failed.
    """
    from quantloom.doctor import examine

    result = examine()
    if json:
        common.print_json(common.plain(result) | {"healthy": result.healthy})
    else:
        _show(result)
    if not result.healthy:
        raise typer.Exit(1)


def _show(result) -> None:
    out = common.console()
    build, processor, cuda = result.build, result.processor, result.cuda
    if build.get("cuda"):
        architectures = build.get("architectures") or []
        kernels = f"built with {build.get('cuda_toolkit')} for {', '.join(map(str, architectures))}"
    else:
        kernels = "not built in (CPU only)"
    devices = [
        f"{device['name']} (compute {device['compute_capability']}, {common.size(device['bytes'])})"
        for device in cuda["devices"]
    ]
    version = f" {cuda['driver_version']}" if cuda["driver_version"] else ""
    driver = f"driver{version} for CUDA {cuda['driver']}; " if cuda["driver"] else ""
    rows = [
        ["quantloom", str(build["version"])],
        ["compiler", str(build.get("compiler", ""))],
        ["Python", result.python],
        ["system", result.platform],
        *([name, version or "not installed"] for name, version in result.packages.items()),
        ["processor", processor["name"]],
        ["features", " ".join(processor["features"]) or "unknown"],
        ["instruction set in use", str(build["cpu_target"])],
        ["threads", f"{processor['threads']} by default, {processor['cpus']} processors usable"],
        ["CUDA kernels", kernels],
        ["CUDA devices", driver + ("; ".join(devices) or cuda["reason"])],
        *([library["name"], library["path"] or library["problem"]] for library in cuda["libraries"]),
    ]
    out.print(common.table(None, ["", ""], rows, show_header=False))
    columns = ["format", "bits", "groups", "operation", "device", "activations", "tokens", "kernel", "target"]
    out.print(
        common.table(
            "Kernels", columns, [[str(entry[column]) for column in columns] for entry in result.kernels]
        )
    )
    out.print(
        common.table(
            "Checks",
            ["check", "result", "detail"],
            [[check.name, "ok" if check.passed else "FAILED", check.detail] for check in result.checks],
        )
    )
