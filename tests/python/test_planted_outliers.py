"""The embedded model with outlier channels planted in front of its layers: the same function.

Gains of norms are multiplied in a few channels, and the columns of the layers that read them divided, so
that the model computes what it did while some inputs are 64 times as large: what SmoothQuant and LLM.int8()
are for.
"""

import json
import shutil
from pathlib import Path

import pytest
import quantloom as ql
import torch
from quantloom import evaluate, models

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
FACTOR = 64.0  # a power of two: nothing is rounded


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted") / "model"
    shutil.copytree(TINY, folder)
    tensors = dict(ql.load_tensors(str(TINY / "model.safetensors"), kind="torch"))
    layers = json.loads((TINY / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for norm, readers in READERS.items():
            prefix = f"model.layers.{layer}."
            gains = tensors[f"{prefix}{norm}.weight"].clone()
            channels = torch.argsort(gains.abs(), descending=True)[:3]
            gains[channels] *= FACTOR
            tensors[f"{prefix}{norm}.weight"] = gains
            for reader in readers:
                weight = tensors[f"{prefix}{reader}.weight"].clone()
                weight[:, channels] /= FACTOR
                tensors[f"{prefix}{reader}.weight"] = weight
    (folder / "model.safetensors").unlink()
    ql.save_tensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def divergence(folder, reference, ids, tmp_path, rounding, activations):
    recipe = ql.Recipe.parse("uniform:8:channel", rounding, activations=activations)
    calibrated = rounding != "nearest" or not recipe.activations.calibrated
    calibration = str(TINY / "calib.txt") if calibrated else None
    out = tmp_path / f"{folder.name}-{rounding}-{activations}".replace(":", "_")
    models.quantize(folder, recipe, calibration, output=out, windows=2, window=96, held_out_windows=0)
    model = models.load(out, torch.float32, dequantized=True)
    return evaluate.compare(model, reference, ids, 96, 3).kl


def test_smoothing_and_outlier_columns_restore_what_planted_channels_cost(planted, tmp_path):
    reference = models.load_reference(planted)
    ids = evaluate.tokens(TINY, TINY / "valid.txt")
    original = models.load_reference(TINY)
    with torch.no_grad():
        x = torch.as_tensor(ids[None, :64].astype("int64"))
        a, b = reference(x).logits, original(x).logits
    assert float((a - b).norm()) < 1e-4 * float(b.norm())  # the same function

    nearest = divergence(planted, reference, ids, tmp_path, "nearest", "int8:token")
    before = divergence(TINY, original, ids, tmp_path, "nearest", "int8:token")
    assert nearest > 4 * before
    for rounding, activations in (
        ("smoothquant", "int8:token"),
        ("nearest", "int8:token:outliers=12"),
        ("nearest", "int8:token:outliers=12:static-outliers"),
        ("nearest", "int8:token:outliers=2%"),
    ):
        kl = divergence(planted, reference, ids, tmp_path, rounding, activations)
        print(f"{rounding} {activations}: KL {kl:.5f}, nearest {nearest:.5f}, unplanted {before:.5f}")
        # Without calibration outliers meet weights of 8 bits, whose small columns were planted, too.
        assert kl < (0.2 if activations.endswith("=12") else 0.05) * nearest
