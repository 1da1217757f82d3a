"""Modules and formats that the tests of training share."""

import torch
from quantloom import fit as F
from quantloom import formats as Q
from torch import nn

INT8_ROWS = Q.LinearScalingFormat(Q.IntFormat(8), Q.BFLOAT16, (1, None), "absmax")
SIGN_3D8 = Q.LinearScalingFormat(
    Q.Sign3D8Format(
        Q.VectorLUTFormat.create(
            torch.cartesian_prod(
                torch.linspace(0, 127, 4), torch.linspace(0, 127, 4), torch.linspace(0, 127, 2)
            ),
            Q.TorchFormat(torch.int8),
            "S3D8",
            range=(0, 127),
        )
    ),
    Q.BFLOAT16,
    (1, None),
    "absmax",
)


def spec(bits=3, family="int", block=(1, 64), scaling="absmax", **settings):
    return F.Scaled(bits, family, Q.BFLOAT16, block, scaling, scaling_match="moments", **settings)


def three_layers():
    torch.manual_seed(100)
    return nn.Sequential(nn.Linear(64, 512, bias=False), nn.RMSNorm((512,)), nn.Linear(512, 64, bias=True))


TRAINED = spec(sparse_format=Q.BFLOAT16, sparse_ratio=1e-3)
