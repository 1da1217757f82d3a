"""Plots of trellis codebooks: pictures that hold what they were given, or an error before any file."""

import io

import numpy as np
import pytest
from quantloom import trellis

pytest.importorskip("matplotlib")
from matplotlib import image
from quantloom import plots


def test_codebooks(tmp_path):
    path = tmp_path / "codebooks.png"
    plots.plot_codebooks(["mul1", "octagon"], path, window=12)
    pixels = image.imread(path)
    rows, columns = pixels.shape[0] // 2, pixels.shape[1] // 3
    panels = pixels[: 2 * rows, : 3 * columns, :3].reshape(2, rows, 3, columns, 3)
    drawn = panels.std(axis=(1, 3, 4)) > 0.02
    # Only two weights a state make pairs.
    assert drawn.tolist() == [[True, True, False], [True, True, True]]
    memory = io.BytesIO()
    plots.plot_codebooks(["mul1", "octagon"], memory, window=12)
    np.testing.assert_array_equal(image.imread(io.BytesIO(memory.getvalue())), pixels)


def test_codebooks_refuse(tmp_path):
    path = tmp_path / "no.png"
    for names, options, words in [
        ([], {}, "names"),
        (["mul9"], {}, "codebook"),
        (["octagon"], {"bits": 5}, "bits: got 5.*octagon"),
        (["mul1"], {"bits": 1.5}, "bits: got 1.5"),
    ]:
        with pytest.raises(ValueError, match=words):
            plots.plot_codebooks(names, path, **options)
    assert not path.exists()


def test_distortion(tmp_path):
    rows = trellis.distortion_table(["lloyd-max", "octagon:l12"], [1, 2], tiles=4, best=True)
    path = tmp_path / "distortion.png"
    plots.plot_distortion(iter(rows), path, "a title")
    assert image.imread(path).std() > 0.05
    with pytest.raises(ValueError, match="rows"):
        plots.plot_distortion([], tmp_path / "no.png")
    assert list(tmp_path.iterdir()) == [path]
