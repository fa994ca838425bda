"""A plan as tables for a terminal, and a sweep over GPUs as a picture."""

from collections.abc import Iterator
from pathlib import Path

from mmscale.hardware import GIB
from mmscale.model.flops import decoder_flops, text_flops, training_flops, vision_flops
from mmscale.plan import LOADER_CPU_S, SAMPLE_BYTES, Plan, largest_micro_batch, memory


def sweep_table(plans: list[Plan]) -> str:
    lines = [f"{'GPUs':>6} {'micro':>6} {'samples/s':>12} {'MFU':>6} {'days':>9} {'price':>12}  binds"]
    for item in plans:
        price = "-" if item.cost is None else f"{item.cost:,.0f}"
        binds = item.step.binds if item.fits else "does not fit"
        lines.append(
            f"{item.setup.gpus:>6} {item.micro_batch:>6} {item.samples_per_s:>12,.0f} {item.mfu:>6.1%} "
            f"{item.days:>9.2f} {price:>12}  {binds}"
        )
    return "\n".join(lines)


def draw_sweep(plans: list[Plan], path: str | Path) -> None:
    """Throughput and price against the number of GPUs, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    gpus = [item.setup.gpus for item in plans]
    axes.loglog(gpus, [item.samples_per_s for item in plans], "o-", label="samples per second")
    ideal = plans[0].samples_per_s / gpus[0]
    axes.loglog(gpus, [ideal * n for n in gpus], ":", color="grey", label="proportional")
    axes.set_xlabel("GPUs")
    axes.set_ylabel("samples per second")
    axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(loc="upper left")
    setup = plans[0].setup
    size, batch = sum(setup.parameters.values()) / 1e6, setup.config.train.global_batch
    axes.set_title(f"{size:,.1f}M parameters, global batch {batch:,}, {setup.gpu_name}")
    if all(item.cost is not None for item in plans):
        price = axes.twinx()
        price.plot(gpus, [item.cost for item in plans], "s--", color="tab:red")
        price.set_ylabel(f"price of {setup.config.train.samples:,} samples", color="tab:red")
        price.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        price.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def describe(plan: Plan) -> str:
    """The plan as tables for a terminal."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    setup, train = plan.setup, plan.setup.config.train
    parts = setup.parameters
    text_length = setup.text_tokens
    yield "parameters    " + ", ".join(f"{name} {count / 1e6:,.1f}M" for name, count in parts.items() if count > 1)
    yield f"              {sum(parts.values()) / 1e6:,.1f}M in all"
    flops = {"vision": vision_flops(setup.model), "text": text_flops(setup.model, text_length)}
    flops["decoder"] = decoder_flops(setup.model, text_length - 1)
    yield "GFLOPs        " + ", ".join(f"{name} {value / 1e9:,.1f}" for name, value in flops.items()) + " forward;"
    yield f"              {training_flops(setup.model, text_length) / 1e9:,.1f} a sample in training"
    assumed = [f"captions of {text_length} tokens"]
    if plan.vocabulary_is_assumed:
        assumed.append(f"a vocabulary of {setup.model.vocab_size:,} (tokenizer.path is not there)")
    yield f"assumed       {', '.join(assumed)}"
    yield ""
    accumulation = train.global_batch // setup.gpus // plan.micro_batch
    yield f"{setup.gpus} GPUs x micro-batch {plan.micro_batch} x accumulation {accumulation} = {train.global_batch}"
    if not plan.fits:
        need, there = plan.memory.total / GIB, setup.gpu.memory / GIB
        yield f"does not fit: {need:.1f} GiB of {there:.0f}; the column `largest` has micro-batches that do"
    yield ""
    yield "`total` is the most that is there at a time, not the sum"
    yield f"{'GiB per GPU':<26}" + "".join(f"{name:>12}" for name in (*vars(plan.memory), "largest"))
    own = setup.config.model.checkpoint
    for stage in range(4):
        for checkpointing in dict.fromkeys(("none", own, "full")):
            need = memory(setup, plan.micro_batch, stage, checkpointing)
            mark = "*" if (stage, checkpointing) == (train.zero_stage, own) else " "
            values = "".join(f"{value / GIB:>12.2f}" for value in vars(need).values())
            largest = largest_micro_batch(setup, stage, checkpointing)
            yield f"{mark} stage {stage}, checkpoint {checkpointing:<7}{values}{largest or 'no fit':>12}"
    yield ""
    step = plan.step
    shown = {"products": step.products, "element-wise": step.element_wise, "optimizer": step.optimizer}
    shown |= {"network": step.network, "host": step.host, "loader": step.loader}
    yield "step          " + ", ".join(f"{name} {value * 1e3:,.1f} ms" for name, value in shown.items())
    yield f"              {step.seconds * 1e3:,.1f} ms in all, bound by: {step.binds}"
    yield f"throughput    {plan.samples_per_s:,.0f} samples/s, MFU {plan.mfu:.1%}"
    rate = plan.samples_per_s / setup.gpus
    cores = rate * LOADER_CPU_S[setup.config.data.decode]
    yield f"loader        {cores:.1f} cores and {rate * SAMPLE_BYTES / 1e6:,.0f} MB/s for each GPU"
    money = "" if plan.cost is None else f", {plan.cost:,.0f} at {setup.price:g} per GPU hour"
    yield f"{train.samples:,} samples  {plan.days:.2f} days{money}"
