"""The forms that a weight is tried in on a GPU, in the order in which reports name them; what is better than another
one (`rather`) comes before it."""

from __future__ import annotations

from spa_compiler.kernels.cuda import vectors
from spa_compiler.kernels.cuda.bitmap import Bitmap
from spa_compiler.kernels.cuda.blocks import GROUPS, SIZES, Blocks
from spa_compiler.kernels.cuda.few import Few
from spa_compiler.kernels.cuda.form import Form
from spa_compiler.kernels.cuda.matvec import GROUPS as FOUR_BIT_GROUPS
from spa_compiler.kernels.cuda.matvec import FourBit
from spa_compiler.kernels.cuda.two_four import TwoFour

FORMS: tuple[Form, ...] = (
    Few(),
    Bitmap(),
    *(Blocks(size, group) for size in SIZES for group in GROUPS if group >= size),
    *(vectors.Vectors(size) for size in vectors.SIZES),
    TwoFour(),
    *(FourBit(group) for group in sorted(FOUR_BIT_GROUPS, reverse=True)),
)
