"""The forms that a weight is tried in on a GPU, in the order in which reports name them."""

from __future__ import annotations

from spa_compiler.kernels.cuda.few import Few
from spa_compiler.kernels.cuda.form import Form

FORMS: tuple[Form, ...] = (Few(),)
