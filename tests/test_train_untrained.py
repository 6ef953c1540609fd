"""Random teachers of official shape are determined by their seed, and none of their weights is zero, which could hide a bug."""

import torch

from bench import untrained
from qdbev.restore import restore


def test_an_untrained_teacher_is_determined_by_its_seed_and_has_no_zero_weights(tmp_path, monkeypatch):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        arguments = ["untrained", "--recipe", "micro", "--teacher", str(tmp_path / f"{name}.pt"), "--set", f"seed={seed}"]
        monkeypatch.setattr("sys.argv", arguments)
        untrained.main()
    (seal, a), (_, b), (_, c) = (restore(tmp_path / f"{name}.pt") for name in "abc")
    assert seal.facts == {"image_hw": [480, 800], "untrained": True}
    assert all(torch.equal(one, two) for one, two in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.backbone.conv1.weight, c.backbone.conv1.weight)
    assert all(parameter.any() for name, parameter in a.named_parameters() if name.endswith("weight"))
