"""Sums over many parts keep their precision when the parts are bf16."""

import torch

from cpfold_train.ops.by_rows import by_rows


def test_gradient_of_a_shared_bf16_tensor_is_summed_in_fp32():
    x = torch.ones(1, 768, 1, dtype=torch.bfloat16)
    shared = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    by_rows(lambda x, w: x * w, 1, (x,), (shared,)).sum().backward()
    assert shared.grad.dtype == torch.bfloat16 and shared.grad.item() == 768
