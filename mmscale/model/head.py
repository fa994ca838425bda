"""The vocabulary head: logits, or the captioning loss without ever holding the logits of all tokens."""

import torch
from torch import Tensor

from .linear import Linear, multiplier


class VocabularyHead(Linear):
    """From the decoder's width to the vocabulary, without a bias.

    The loss is computed in here, so that a sharded weight is present while it is needed.
    """

    # Bounds the logits that are held at a time: 16 Mi elements are 64 MiB in fp32.
    chunk_elements = 1 << 24

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Logits [..., vocabulary]; or, with `labels` [tokens], the loss summed over `hidden` [tokens, width].

        Args:
            label_smoothing: share of the target that is spread evenly over the vocabulary.
            z_loss: weight of the squared log-partition function (https://arxiv.org/abs/2204.02311, section 5).
        """
        if labels is None:
            return super().forward(hidden)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        rows = max(1, self.chunk_elements // self.out_features)
        return _LinearCrossEntropy.apply(hidden, self.weight, labels, label_smoothing, z_loss, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum over tokens of the cross entropy of `hidden @ weight.T`, in chunks of tokens.

    The gradients are made chunk by chunk while the chunk's logits are there; backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing, z_loss, rows):
        matrix = weight.to(hidden.dtype)
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = None
        loss = torch.zeros((), dtype=accumulator, device=hidden.device)
        vocab = weight.shape[0]
        with torch.autocast(hidden.device.type, enabled=False):
            multiply = multiplier(hidden, matrix)
            for start in range(0, hidden.shape[0], rows):
                x, y = hidden[start : start + rows], labels[start : start + rows, None]
                logits = multiply(x, matrix).to(accumulator)
                lse = logits.logsumexp(1, keepdim=True)
                target = logits.gather(1, y)
                if label_smoothing:
                    target = target.mul_(1 - label_smoothing).add_(logits.mean(1, keepdim=True), alpha=label_smoothing)
                loss += (lse - target).sum() + z_loss * lse.square().sum()
                if not (need_hidden or need_weight):
                    continue
                grad = logits.sub_(lse).exp_()  # the softmax, over the logits
                if z_loss:
                    grad.mul_(1 + 2 * z_loss * lse)
                if label_smoothing:
                    grad.sub_(label_smoothing / vocab)
                grad.scatter_add_(1, y, torch.full_like(lse, label_smoothing - 1))
                grad = grad.to(hidden.dtype)
                if need_hidden:
                    d_hidden[start : start + rows] = multiply(grad, matrix.T)
                if need_weight:
                    if d_weight is None:
                        d_weight = multiply(grad.T, x.T).to(weight.dtype)
                    else:
                        d_weight += multiply(grad.T, x.T)
        if need_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        ctx.gradients = (d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        assert ctx.gradients is not None, "the captioning loss can be differentiated only once"
        # Scaled in place: a second buffer of the weight's size would be as large as the head itself.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients)
        return (*scaled, None, None, None, None)
