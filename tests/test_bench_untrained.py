"""Random teachers of official shape depend on their seed only, and none of their weights is zero, which could hide a bug."""

import torch

from bench import untrained
from qdbev.restore import restore


def test_an_untrained_teacher_is_determined_by_its_seed_and_has_no_zero_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        untrained.main(["--recipe", "micro", "--teacher", str(tmp_path / f"{name}.pt"), "--set", f"seed={seed}"])
    (seal, a), (_, b), (_, c) = (restore(tmp_path / f"{name}.pt") for name in "abc")
    assert (seal.facts.image_hw, seal.facts.untrained) == ((96, 160), True)  # 180 x 320 stored, scaled by 0.5, padded to multiples of 32
    assert all(torch.equal(one, two) for one, two in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.backbone.conv1.weight, c.backbone.conv1.weight)
    assert all(parameter.any() for name, parameter in a.named_parameters() if name.endswith("weight"))
