"""Plans for people: tables of one, and of the plans of a sweep."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table

if TYPE_CHECKING:
    from ssljax.plan import Plan

GIB = 2**30


def show(plan: "Plan") -> Group:
    """The plan of one config as tables."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    head = f"[bold]{' '.join((plan.config, *plan.overrides))}[/] on {plan.topology}: {plan.chips} chips, mesh {mesh}, "
    head += f"batch {plan.batch_size:,}; compiled in {plan.compile_seconds:.0f} s"
    memory = Table("memory of a chip", "GiB", title_justify="left")
    for name, size in plan.memory.items():
        if size:
            memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_section()
    memory.add_row("together", f"{plan.needs / GIB:.2f}")
    memory.add_row("there are", f"{plan.capacity / GIB:.2f}")
    if not plan.seconds:
        verdict = (
            "[bold green]fits[/]"
            if plan.fits
            else f"[bold red]does not fit[/]: needs {gib(plan.needs)} of {gib(plan.capacity)} on each chip"
        )
        return Group(head, memory, verdict, *(f"  - {line}" for line in plan.advice), *plan.notes)
    work = Table("a step on a chip", "amount", "ms alone")
    amounts = f"{plan.flops / plan.chips / 1e12:.2f} TFLOP", f"{plan.memory_traffic / 1e9:.1f} GB"
    sent = f"{sum(row.sent for row in plan.collectives) / 1e9:.3f} GB sent"
    for (name, seconds), amount in zip(plan.seconds.items(), (*amounts, sent), strict=True):
        work.add_row({"compute": "matrix products"}.get(name, name), amount, _ms(seconds))
    traffic = Table("collective", "over", "times", "MB sent", "ms")
    for row in plan.collectives:
        traffic.add_row(row.kind, row.axes, f"{row.count:.0f}", f"{row.sent / 1e6:.2f}", _ms(row.seconds))
    for table in (memory, work, traffic):
        for column in table.columns[1:]:
            column.justify = "left" if column.header == "over" else "right"
    fastest, slowest = plan.fastest or 0.0, plan.slowest or 0.0
    rate = [plan.batch_size / seconds for seconds in (slowest, fastest)]
    days = [plan.steps * seconds / 86_400 for seconds in (fastest, slowest)]
    lines = (
        f"[bold green]fits[/]; first bottleneck: [bold]{plan.bottleneck}[/]",
        f"step: {_ms(fastest)} ms if compute, memory and network overlap, {_ms(slowest)} ms if they take turns",
        f"MFU: at most {100 * (plan.mfu or 0.0):.0f} % ({plan.model_flops / 1e12:,.0f} TFLOP a step without "
        f"rematerialisation, {plan.flops / 1e12:,.0f} with it)",
        _views_line(plan),
        f"{rate[0]:,.0f} to {rate[1]:,.0f} examples/s; {plan.steps:,} steps: {days[0]:.2f} to {days[1]:.2f} days",
    )
    return Group(head, memory, work, *([traffic] if plan.collectives else []), *lines, *plan.notes)


def ranking(plans: Sequence["Plan"]) -> Table:
    """The plans of a sweep, in their order."""
    table = Table("mesh", "remat", "GiB", "step, ms", "MFU at most", "first bottleneck")
    for column in table.columns[2:5]:
        column.justify = "right"
    for plan in plans:
        mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one chip"
        policy = "/".join(dict.fromkeys(plan.remat.values()))
        memory = f"{plan.needs / GIB:.1f} of {plan.capacity / GIB:.1f}"
        if plan.fits and plan.fastest and plan.slowest and plan.mfu:
            step, mfu = f"{_ms(plan.fastest)} to {_ms(plan.slowest)}", f"{100 * plan.mfu:.0f} %"
        else:
            step, mfu = "does not fit", ""
        table.add_row(mesh, policy, memory, step, mfu, plan.bottleneck)
    return table


def _views_line(plan: "Plan") -> str:
    """What augmentation on the device costs."""
    fastest, slowest = max(plan.views.values()), sum(plan.views.values())
    share = [views / step for views, step in ((fastest, plan.fastest), (slowest, plan.slowest)) if step]
    part = f"{min(share):.1%} to {max(share):.1%} of it"
    return f"views (augmentation), in the step: {_ms(fastest)} to {_ms(slowest)} ms alone, {part}"


def gib(size: float) -> str:
    """`1.50 GiB`."""
    return f"{size / GIB:.2f} GiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f}"
