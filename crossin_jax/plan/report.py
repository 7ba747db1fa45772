"""What a plan says: its table, and what is said before and after it."""

from collections.abc import Iterator, Sequence

from crossin_jax.plan.plan import GIB, Plan
from crossin_jax.tables import Table


def render(plan: Plan) -> Iterator[str | Table]:
    """The plan for people: its table, and what is said before and after it."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    yield (
        f"{plan.topology}: {plan.chips} chips on {plan.hosts} hosts, mesh {mesh}, "
        f"{plan.tokens_per_step:,} tokens per step"
    )
    yield Table(("per chip", *plan.phases), list(_describe_phases(plan)), "<>")
    if plan.read_bytes:
        yield (
            f"loading: a host reads {plan.read_bytes / GIB:.2f} GiB of weights; "
            f"its memory peaks at about {plan.host_peak_bytes / GIB:.2f} GiB"
        )
    yield f"checkpoints: a host copies and writes {plan.saved_bytes / GIB:.2f} GiB"
    train = plan.phases.get("train")
    if train and train.seconds:
        rates = [plan.tokens_per_step / seconds for seconds in reversed(train.seconds)]
        hours = (
            f"; {plan.steps:,} steps take {_describe_hours(plan.hours, plan.chips)}"
            if plan.hours
            else "; set train.steps for the hours of the run"
        )
        yield f"training, estimated: {_describe_range(rates)} tokens/s{hours}"
    if plan.answer_hours:
        yield (
            f"evaluation, estimated: 1,000 prompts of full length with answers of "
            f"{plan.answer_tokens} tokens take {_describe_hours(plan.answer_hours, plan.chips)}"
        )
    yield "fits" if plan.fits else "does not fit"


def _describe_range(values: Sequence[float]) -> str:
    """A lower and an upper value, with three digits."""
    return " to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)


def _describe_hours(hours: tuple[float, float], chips: int) -> str:
    """Hours of the run and of its chips."""
    of_chips = [chips * one for one in hours]
    return f"{_describe_range(hours)} hours, {_describe_range(of_chips)} chip-hours"


def _describe_phases(plan: Plan) -> Iterator[tuple[str, ...]]:
    """The rows of the table: a label, and a cell for each phase."""
    phases = plan.phases.values()

    def row(label: str, values: list[float | None], form: str = ",.2f") -> tuple[str, ...]:
        return (label, *("-" if value is None else f"{value:{form}}" for value in values))

    def scaled(field: str, unit: float) -> list[float | None]:
        values = [getattr(phase, field) for phase in phases]
        return [None if value is None else value / unit for value in values]

    yield row("HBM, arguments, GiB", scaled("argument_bytes", GIB))
    yield row("HBM, temporaries, GiB", scaled("temporary_bytes", GIB))
    yield row(f"HBM, peak of {plan.hbm_limit / GIB:.2f} GiB", scaled("peak_bytes", GIB))
    if any(phase.offloaded_bytes for phase in phases):
        yield row("memory of its host, GiB", scaled("offloaded_bytes", GIB))
    yield row("matrix TFLOP executed", scaled("flops", 1e12), ",.3f")
    yield row("  of it in attention kernels (formula)", scaled("kernel_flops", 1e12), ",.3f")
    yield row("HBM traffic, GB", scaled("hbm_bytes", 1e9))
    yield row("compiler's Mcycles", scaled("cycles", 1e6), ",.1f")
    shares = [phase.matrix_cycles / phase.cycles if phase.cycles else None for phase in phases]
    yield row("  of it matrix work", shares, ".0%")
    for kind in sorted({kind for phase in phases for kind in phase.sent_bytes or ()}):
        sent = [(phase.sent_bytes or {}).get(kind, 0) / 1e9 for phase in phases]
        yield row(f"sent by {kind}, GB", sent)
        beside = [(phase.beside_bytes or {}).get(kind, 0) / 1e9 for phase in phases]
        shares = [part / whole if whole else None for part, whole in zip(beside, sent, strict=True)]
        yield row("  of it beside other work", shares, ".0%")
        times = [(phase.collectives or {}).get(kind, 0) for phase in phases]
        yield row("  times", times, ",.0f")
    yield row("compiled here in seconds", scaled("compile_seconds", 1), ",.0f")
    yield row("seconds at least (ceiling of the chip)", scaled("floor_seconds", 1), ",.4f")
    for label, field in (("seconds waiting", "waiting_seconds"), ("seconds, estimated", "seconds")):
        pairs = [getattr(phase, field) for phase in phases]
        yield label, *("-" if pair is None else _describe_range(pair) for pair in pairs)
