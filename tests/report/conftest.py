import pytest

from spa_compiler.report.report import (
    Asked,
    Candidate,
    Check,
    Machine,
    PassChange,
    Placement,
    RaceRow,
    Ratio,
    Report,
    SiteChange,
    Sizes,
    SkippedSite,
    Stage,
    Versions,
)


@pytest.fixture
def full() -> Report:
    """A report with something in every field, names that look like markup among them."""
    change = SiteChange(
        node="[b]fc[/b]",
        op="Gemm",
        weight="W",
        pattern="block:4x1",
        n=3072,
        k=768,
        density_before=1.0,
        density_after=0.1,
        error=0.4321,
        method="sparsegpt",
    )
    skipped = SkippedSite(node="head", reason="it reaches an output")
    candidates = (
        Candidate(name="dense", median_us=100.0, p10_us=95.0, p90_us=110.0, chosen=False),
        Candidate(name="block:4x1", median_us=20.0, p10_us=19.0, p90_us=22.5, chosen=True),
    )
    return Report(
        spa_compiler="0.1.0",
        asked=Asked(source="m.onnx", target="cpu", seed=0, recipe={"version": 1, "passes": []}, options={"threads": 1}),
        versions=Versions(
            spa_compiler="0.1.0", python="3.11", onnx="1.19", onnxruntime="1.20", tvm="0.27", numpy="2.0"
        ),
        machine=Machine(
            cpu="zen5", isa="x86-64-v4", cores=2, threads=1, platform="Linux", providers=("CPUExecutionProvider",)
        ),
        isa="x86-64-v4",
        shapes=["1x128"],
        notes=["folded a BatchNormalization"],
        passes=[PassChange(name="sparsify", summary="90 % zeros in 1 weight", sites=(change,), skipped=(skipped,))],
        placements=[
            Placement(
                node="[bold]layer/0[/x]",
                op="MatMul",
                n=3072,
                k=768,
                tokens=128,
                form="sparse",
                pattern="block:4x1",
                density=0.1,
                candidates=candidates,
                reason="5.0x as fast as dense",
                would_help="nothing",
            )
        ],
        race=[RaceRow(shape="1x128", runtime="spa", median_ms=2.0, p10_ms=1.9, p90_ms=2.2, model="m-spa")],
        ratios=[Ratio(model="m-spa", over="onnxruntime", shape="1x128", ratio=4.5)],
        checks=[Check(output="y", shape="1x128", threads=1, error=1e-6, tolerance=1e-5, noise=1e-7)],
        hints=["--sparsity 0.9 --pattern block:4x1 would make it faster"],
        sizes=Sizes(source=90_400_000, model=20_000_000, portable=90_000_000, kernels=300_000),
        stages=[Stage(name="load", seconds=0.1)],
    )
