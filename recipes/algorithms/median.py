"""A baseline: the median score of the group, which one very good or very bad response does not move."""

import torch


def group_median(scores, group_ids):
    baseline = torch.empty_like(scores)
    for group in group_ids.unique():
        members = group_ids == group
        baseline[members] = scores[members].quantile(0.5)
    return baseline
