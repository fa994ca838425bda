"""Hidden states and attention weights on request, taken down while the blocks run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

Record = dict[str, tuple[Tensor, ...]]


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_hidden_states(parts: dict[str, list[nn.Module]], record: Record | None):
    """While it is open, every block adds its input to `record`, and the last block of a part its output."""
    if record is None:
        return nullcontext()
    handles = []
    for part, blocks in parts.items():

        def before(module, arguments, part=part):
            record[part] = (*record.get(part, ()), arguments[0])

        def after(module, arguments, output, part=part):
            record[part] = (*record.get(part, ()), output)

        handles += [block.register_forward_pre_hook(before) for block in blocks]
        handles.append(blocks[-1].register_forward_hook(after))
    return _hooks(handles)


def record_attentions(parts: dict[str, list[nn.Module]], record: Record | None):
    """While it is open, the attention of every block adds its weights [batch, heads, queries, keys] to `record`.

    Raises:
        ValueError: when a layer has none, because its implementation never makes them.
    """
    if record is None:
        return nullcontext()
    handles = []
    for part, blocks in parts.items():

        def after(module, arguments, output, part=part):
            if output[1] is None:
                raise ValueError('output_attentions needs attn_implementation="eager"; fused kernels keep no weights')
            record[part] = (*record.get(part, ()), output[1])

        handles += [block.attention.register_forward_hook(after) for block in blocks]
    return _hooks(handles)
