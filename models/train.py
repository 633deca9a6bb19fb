"""Trains the two example models on scikit-learn's digits and writes everything in this folder but the scripts.

Run once (`pip install -e ".[cpu,train]"`, then `python models/train.py`, some minutes on two cores); the result is
committed. Training is plain: Adam with L2 decay, dropout, label smoothing and small random distortions of the
images. Nothing is pruned here. The table at the end says what one-shot magnitude pruning would cost; the recipe that
`make demo` uses is chosen from the calibration images alone, the evaluation images only report.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import optimizer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

HERE = Path(__file__).resolve().parent
SEED = 20
CLASSES = 10
SIDE = 8  # pixels; a digits image is 8 x 8 with values 0 to 16
WHITE = 16.0
CALIBRATION, EVALUATION = 256, 400  # images; the rest trains
BATCH = 32
WARM_UP = 0.1  # share of the steps in which the learning rate rises
OPSET = 18
SPARSITIES = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9)
PATTERNS = {"unstructured": 1, "block:4x1": 4}  # rows of a block
RECIPE_PATTERN, RECIPE_LOSS = "block:4x1", 0.01  # of accuracy on the calibration images

LEAST_KEPT = 0.2  # see `kept_blocks`

#: images float32 `[n, 1, 8, 8]` and labels int64 `[n]` of each part
Parts = dict[str, tuple[np.ndarray, np.ndarray]]


class Attention(nn.Module):
    """Multi-head self-attention, `[batch, tokens, width]` -> the same, with separate query, key and value layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:  # [batch, heads, tokens, width / heads]
            return t.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) * self.scale, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Pre-norm transformer layer: attention, then a GELU feed-forward network, each with a residual."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.drop(self.norm_attention(x)))
        return x + self.down(self.drop(functional.gelu(self.up(self.drop(self.norm_feed(x))))))


class DigitsTransformer(nn.Module):
    """A small vision transformer: 16 patches of 2 x 2 pixels, mean over the tokens, `[batch, 1, 8, 8]` -> logits."""

    def __init__(
        self, width: int = 256, heads: int = 4, hidden: int = 1024, depth: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(torch.randn((SIDE // 2) ** 2, width) * 0.3)
        self.layers = nn.Sequential(*(EncoderLayer(width, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        return self.classifier(self.norm(self.layers(x)).mean(dim=1))


class InvertedResidual(nn.Module):
    """Pointwise up, depthwise 3 x 3, pointwise down, each with batch norm, and a residual (as in MobileNetV2)."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width), nn.Dropout2d(dropout),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class DigitsConvNet(nn.Module):
    """Inverted residual blocks at full resolution, `[batch, 1, 8, 8]` -> logits; mostly 1 x 1 convolutions."""

    def __init__(self, width: int = 128, hidden: int = 384, depth: int = 5, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(InvertedResidual(width, hidden, dropout) for _ in range(depth)))
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(image)).mean(dim=(2, 3)))


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that `sparsify` would take: every Linear and 1 x 1 convolution but the classifier."""
    kinds = (nn.Linear, nn.Conv2d)
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and module.weight[0, 0].numel() == 1
        and module.weight.shape[1] > 1
        and name != "classifier"
    }


def folded(model: nn.Module) -> nn.Module:
    """A copy in which batch norms are part of the convolutions before them: pruning sees the weights after folding."""
    model = copy.deepcopy(model)
    for block in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        for i, (conv, norm) in enumerate(itertools.pairwise(list(block))):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[i], block[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return model


def shrink(model: nn.Module, std: float) -> None:
    """Starts the matrices that pruning will look at from small values, so that what is large later was learned."""
    for weight in prunable(model).values():
        nn.init.trunc_normal_(weight, std=std)


def block_scores(weight: np.ndarray, rows: int) -> np.ndarray:
    """Summed squares of each `rows` x 1 block of `weight` `[n, k]`, as `[n / rows, k]`."""
    n, k = weight.shape
    return np.square(weight, dtype=np.float64).reshape(n // rows, rows, k).sum(axis=1)


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small random rotations, scalings and shifts, and a little noise; `[batch, 1, 8, 8]`."""
    n = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale, pixel = uniform(math.radians(8)), 1 + uniform(0.08), 2 / SIDE
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    matrix = torch.stack([cos, -sin, uniform(0.5 * pixel), sin, cos, uniform(0.5 * pixel)], dim=1).view(n, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return moved + 0.03 * torch.randn(moved.shape, generator=generator)


def split() -> Parts:
    """The digits as `images` float32 `[n, 1, 8, 8]` in 0..1 and `labels`, shuffled and cut in three disjoint parts."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(images))
    images = (images[order] / WHITE).astype(np.float32).reshape(-1, 1, SIDE, SIDE)
    labels = labels[order].astype(np.int64)
    cuts = {"evaluation": slice(0, EVALUATION), "calibration": slice(EVALUATION, EVALUATION + CALIBRATION)}
    cuts["train"] = slice(EVALUATION + CALIBRATION, None)
    return {name: (images[cut], labels[cut]) for name, cut in cuts.items()}


@dataclass(frozen=True)
class Run:
    """How one model is made."""

    model: Callable[[], nn.Module]
    epochs: int
    rate: float  # the learning rate at its peak
    decay: float  # L2, part of the gradient: with Adam this empties weights that nothing asks for (AdamW's would not)
    start: float  # standard deviation of the first weights, see `shrink`


RUNS = {
    "digits_transformer": Run(lambda: DigitsTransformer(dropout=0.2), epochs=40, rate=1e-3, decay=2e-4, start=0.01),
    "digits_convnet": Run(DigitsConvNet, epochs=14, rate=2e-3, decay=3e-3, start=0.05),
}


def train(model: nn.Module, images: np.ndarray, labels: np.ndarray, run: Run) -> None:
    """Adam, one warm-up and one cosine; the decay falls on weight matrices alone."""
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "position"]
    rest = [p for name, p in model.named_parameters() if p.ndim <= 1 or name == "position"]
    groups = [{"params": matrices, "weight_decay": run.decay}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.Adam(groups, lr=run.rate)
    steps = run.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, run.rate, steps, pct_start=WARM_UP, cycle_momentum=False)
    generator = torch.Generator().manual_seed(SEED)
    model.train()
    started = time.perf_counter()
    for epoch in range(run.epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x) - BATCH + 1, BATCH):
            pick = order[start : start + BATCH]
            loss = functional.cross_entropy(model(distort(x[pick], generator)), y[pick], label_smoothing=0.1)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
        if epoch % 10 == 9:
            seconds = time.perf_counter() - started
            print(f"  epoch {epoch + 1}/{run.epochs}: loss {loss.item():.3f} after {seconds:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of `images` that `model` puts in the right class."""
    return float((model(torch.from_numpy(images)).argmax(dim=1).numpy() == labels).mean())


def kept_blocks(matrices: list[np.ndarray], block: int, sparsity: float, scope: str) -> list[np.ndarray]:
    """What stays of each `[n, k]`, by the rules of the pass `sparsify` (restated, so that training needs no compiler).

    Scope `layer` takes the same share from each; `global` ranks the blocks of all together by their squares and leaves
    every matrix at least `LEAST_KEPT` of the share that stays.
    """
    masks = []
    scores = [block_scores(m, block) for m in matrices]
    if scope == "global":
        floors = [np.quantile(s, 1 - LEAST_KEPT * (1 - sparsity)) for s in scores]
        scores = [np.where(s > floor, np.inf, s) for s, floor in zip(scores, floors, strict=True)]
        every = np.sort(np.concatenate([s.ravel() for s in scores]))
        shared = every[round(every.size * sparsity) - 1]
    for s in scores:
        bar = shared if scope == "global" else np.quantile(s, sparsity)
        masks.append((s > bar).repeat(block, axis=0))
    return masks


def pruned_accuracies(model: nn.Module, parts: Parts) -> list[dict[str, Any]]:
    """Accuracy on calibration and evaluation after one-shot magnitude pruning."""
    model = folded(model)
    weights = prunable(model)
    matrices = [weight.detach().flatten(1).numpy().copy() for weight in weights.values()]
    rows: list[dict[str, Any]] = []
    for (pattern, block), scope, sparsity in itertools.product(PATTERNS.items(), ("global", "layer"), SPARSITIES):
        masks = kept_blocks(matrices, block, sparsity, scope)
        for weight, matrix, mask in zip(weights.values(), matrices, masks, strict=True):
            weight.data = torch.from_numpy(matrix * mask).reshape(weight.shape)
        found = {part: round(accuracy(model, *parts[part]), 4) for part in ("calibration", "evaluation")}
        rows.append({"pattern": pattern, "scope": scope, "sparsity": sparsity, **found})
    return rows


def choose(rows: list[dict[str, Any]], unpruned: float) -> dict[str, Any] | None:
    """The highest sparsity in blocks that costs the calibration images little; the evaluation images have no say."""
    fit = [r for r in rows if r["pattern"] == RECIPE_PATTERN and r["calibration"] >= unpruned - RECIPE_LOSS]
    best = max(fit, key=lambda r: (r["sparsity"], r["scope"] == "global"), default=None)
    return best and {key: best[key] for key in ("pattern", "scope", "sparsity")}


def export(model: nn.Module, path: Path) -> None:
    """Writes `path`, dynamic batch, batch norms left as they are, and checks it against the model at three sizes."""
    example = torch.rand(2, 1, SIDE, SIDE)
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        model, (example,), dynamo=True, optimize=False, opset_version=OPSET, external_data=False,
        input_names=["image"], output_names=["logits"], dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        optimizer.fold_constants(program.model)  # the rewrites of `optimize` would fold the batch norms too
        optimizer.remove_unused_nodes(program.model)
    else:
        program.optimize()
    proto = program.model_proto
    for node in proto.graph.node:  # the exporter's stack traces name files of the machine that ran it
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:], proto.metadata_props[:]
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    session = open_session(path)
    for size in (1, 3, 64):
        images = torch.rand(size, 1, SIDE, SIDE)
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(session.run(None, {"image": images.numpy()})[0], expected, atol=1e-4)


def open_session(path: Path) -> ort.InferenceSession:
    """ONNX Runtime with its defaults on the CPU."""
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def store(name: str, **arrays: np.ndarray) -> dict[str, Any]:
    """Writes a compressed .npz and returns its line of the manifest."""
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return {"file": path.name, "sha256": sha256(path), "images": len(arrays["image"])}


def sha256(path: Path) -> str:
    """Of the file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def build(name: str, run: Run, parts: Parts) -> dict[str, Any]:
    """Trains, exports and measures one model; returns its entry of the manifest."""
    print(name, flush=True)
    torch.manual_seed(SEED)
    model = run.model()
    shrink(model, run.start)
    train(model, *parts["train"], run)
    path = HERE / f"{name}.onnx"
    export(model, path)
    images, labels = parts["evaluation"]
    logits = open_session(path).run(None, {"image": images})[0]
    rows = pruned_accuracies(model, parts)
    unpruned = accuracy(model, *parts["calibration"])
    entry: dict[str, Any] = {
        "file": path.name,
        "sha256": sha256(path),
        "parameters": sum(p.numel() for p in model.parameters()),
        "input": {"name": "image", "dtype": "float32", "shape": ["batch", 1, SIDE, SIDE]},
        "classes": CLASSES,
        "accuracy": round(float((logits.argmax(axis=1) == labels).mean()), 4),
        "calibration_accuracy": round(unpruned, 4),
        "recipe": choose(rows, unpruned),
        "one_shot_pruning": rows,
    }
    print(f"  accuracy {entry['accuracy']}, on calibration {entry['calibration_accuracy']}, recipe {entry['recipe']}")
    for row in rows:
        print("  {pattern:14} {scope:7} {sparsity:.0%}  {calibration:.4f} {evaluation:.4f}".format(**row))
    return entry


def main() -> None:
    """Writes the models, their data and the manifest beside this file."""
    torch.set_num_threads(1)  # the order of sums, and so the result, depends on it
    parts = split()
    data = {
        "calibration": store("calibration", image=parts["calibration"][0]),
        "evaluation": store("evaluation", image=parts["evaluation"][0], labels=parts["evaluation"][1]),
    }
    manifest = {
        "models": {name: build(name, run, parts) for name, run in RUNS.items()},
        "data": {
            **data,
            "train": {"images": len(parts["train"][0])},
            "seed": SEED,
            "source": "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), UCI Machine Learning "
            "Repository, test set as it comes with scikit-learn",
            "licence": "CC BY 4.0",
        },
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": ort.__version__},
    }
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
