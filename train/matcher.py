"""Assigns object queries to annotated objects by optimal bipartite matching.

Source: DETR (arXiv:2005.12872), equation 1, with the costs of bevformer core/bbox/assigners/hungarian_assigner_3d.py at 66b65f3.
Q queries, G objects.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ALPHA = 0.25
"""Weight of the foreground in the focal loss, whose exponent gamma is 2."""
_EPS = 1e-12
"""Added to probabilities before the logarithm."""
_MATCHED_CODES = 8
"""Numbers of a box code that are compared; the last two, the velocity, are not."""


def cls_cost(cls_logits: Tensor, labels: Tensor) -> Tensor:
    """Return (Q, G): focal loss of predicting the object's class, minus that of not predicting it; logits (Q, classes), labels (G,)."""
    p = cls_logits.sigmoid()
    positive = -(p + _EPS).log() * ALPHA * (1 - p) ** 2
    negative = -(1 - p + _EPS).log() * (1 - ALPHA) * p**2
    return (positive - negative)[:, labels]


def box_cost(box_code: Tensor, target_code: Tensor) -> Tensor:
    """Return (Q, G): the L1 distance over the first eight numbers of codes (Q, 10) and (G, 10)."""
    return torch.cdist(box_code[:, :_MATCHED_CODES], target_code[:, :_MATCHED_CODES], p=1)


@torch.no_grad()
def match(
    cls_logits: Tensor, box_code: Tensor, target_code: Tensor, labels: Tensor, cls_weight: float, box_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the pairs (query, object) with the lowest total cost, as two index tensors (min(Q, G),) int64 on the device of `cls_logits`.

    Shapes: cls_logits (Q, classes), box_code (Q, 10), target_code (G, 10), which must be finite, labels (G,).
    """
    cost = cls_weight * cls_cost(cls_logits.float(), labels) + box_weight * box_cost(box_code.float(), target_code)
    query, target = linear_sum_assignment(np.nan_to_num(cost.cpu().numpy(), nan=1e6, posinf=1e6, neginf=-1e6))
    return torch.as_tensor(query, device=cls_logits.device), torch.as_tensor(target, device=cls_logits.device)
