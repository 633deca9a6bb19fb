"""Both exporters' files of one architecture, and files with and without folding, have the same groups."""

from __future__ import annotations

import pytest

from spa_compiler.graph.canonicalize import canonicalize
from spa_compiler.graph.load import load
from tests.analysis.sites import sites_of
from tests.peers import graphs

pytestmark = [pytest.mark.peers, pytest.mark.slow]

PAIRS = {
    "bert": ("bert_dynamo", "bert_nofold"),
    "convnext_tiny": ("convnext_tiny_dynamo",),
    "densenet121": ("densenet121_dynamo",),
    "lstm_tagger": ("lstm_tagger_nofold",),
    "llama_gqa": ("llama_gqa_dynamo", "llama_gqa_dynamo_op23"),
    "mobilenet_v3_small": ("mobilenet_v3_small_dynamo",),
    "resnet18": ("resnet18_bnfolded", "resnet18_dynamo", "resnet18_nofold"),
    "resnet50": ("resnet50_dynamo",),
    "resnet_groupnorm": ("resnet_groupnorm_dynamo",),
    "shufflenet_v2_x1_0": ("shufflenet_v2_x1_0_dynamo",),
    "swin_t": ("swin_t_dynamo",),
    "unet": ("unet_dynamo",),
    "vit_tiny": ("vit_tiny_dynamo",),
    "yolo_c2f": ("yolo_c2f_bnfolded",),
}


@graphs.needs_zoo
@pytest.mark.parametrize("one, other", [(one, other) for one, others in PAIRS.items() for other in others])
def test_two_files_of_one_model(one: str, other: str) -> None:
    first, second = (canonicalize(load(graphs.zoo_graph(name, 0)[0]), []).model for name in (one, other))
    assert sites_of(first) == sites_of(second)


@graphs.needs_zoo
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "yolo_c2f", "unet", "vit_tiny"])
def test_before_and_after_canonicalization(name: str) -> None:
    model = load(graphs.zoo_graph(name, 0)[0])
    assert sites_of(model) == sites_of(canonicalize(model, []).model)
