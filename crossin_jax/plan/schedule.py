"""How long a chip waits for its links: the schedule of a compiled program, played on clocks.

The text of a compiled program is its schedule: a chip runs the instructions of a computation in
their order. A collective stands alone, or it starts, other work runs, and it is done:

    work 3 ms │ start A │ work 5 ms │ done A │ B alone │ work 2 ms

If A takes 6 ms on the links, the chip waits 1 ms for it. It waits for the whole of B.
"""

import dataclasses
import re

from crossin_jax.plan.hlo import Computation, Instruction

# the end of the kind of a collective that uses the slow network
BETWEEN_SLICES = " between slices"


@dataclasses.dataclass(frozen=True)
class Event:
    """One step of a computation: work of so many cycles, or a collective that starts or is done."""

    kind: str
    # cycles of work; bytes that a chip sends
    amount: float = 0.0
    # of a collective: the same where it starts and where it is done
    key: str = ""
    between_slices: bool = False


# how often a computation runs, and its steps
Timeline = tuple[float, list[Event]]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of a chip: cycles per second, bytes per second of its links and of the network between
    slices, and the seconds that a collective takes on each of them beside those of its bytes.
    """

    clock: float
    links: float
    network: float
    link_latency: float = 0.0
    network_latency: float = 0.0


def waiting_seconds(timelines: list[Timeline], speed: Speed) -> float:
    """How long a chip waits for collectives in one run of a program."""
    return sum(times * _wait(events, speed) for times, events in timelines)


def _wait(events: list[Event], speed: Speed) -> float:
    now = waited = 0.0
    # when the links and the network have sent everything so far, and when each collective is done
    free, done = {False: 0.0, True: 0.0}, {}
    for event in events:
        if event.kind == "work":
            now += event.amount / speed.clock
        elif event.kind == "start":
            rate, latency = (speed.links, speed.link_latency)
            if event.between_slices:
                rate, latency = (speed.network, speed.network_latency)
            start = max(now, free[event.between_slices])
            done[event.key] = start + latency + event.amount / rate
            free[event.between_slices] = done[event.key]
        elif (wait := done.get(event.key, now) - now) > 0:
            now += wait
            waited += wait
    return waited


# ---- Where collectives start, and where they are done


def chain_key(one: Instruction) -> str:
    """What the parts of an asynchronous collective have in common, as in chain_id="3"."""
    return "chain " + re.search(r'chain_id="?(\w+)', one.attributes).group(1)


def rendezvous_key(one: Instruction) -> str:
    """What the two sides of a transfer between slices have in common."""
    return re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', one.attributes).group(1)


def done_key(body: Computation, one: Instruction) -> str | None:
    """The key of the collective whose result an instruction waits for."""
    if 'custom_call_target="AsyncCollectiveDone"' in one.attributes:
        chains = [body[o] for o in one.operands if "chain_id=" in body[o].attributes]
        return chain_key(chains[0]) if chains else None
    if one.op == "recv-done" and "_xla_megascale" in body[one.operands[0]].attributes:
        return rendezvous_key(body[one.operands[0]])
    return one.operands[0] if one.op.endswith("-done") else None


def sent_between_slices(body: Computation, one: Instruction) -> tuple[str, float] | None:
    """The kind of a transfer between slices and the bytes that each chip sends for it."""
    # One chip of every slice takes part: _xla_megascale_target="{1,2}x{0:3}" are slices 1 and 2.
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', one.attributes)
    if not kind:
        return None
    first = re.search(r'_xla_megascale_target="\{([^}]*)\}', one.attributes)
    slices = 0
    for part in first.group(1).split(",") if first else ("1:2",):
        low, _, high = part.partition(":")
        slices += int(high or low) - int(low) + 1
    inputs = sum(shape.bytes for o in one.operands for shape in body[o].shapes)
    name = kind.group(1).lower().replace("_", "-")
    # A chip gives its share to every other slice. Of what all have, it sends all but its own part,
    # and an all-reduce goes round twice.
    turns = {"all-gather": slices, "all-reduce": 2}.get(name, 1)
    return name + BETWEEN_SLICES, inputs * turns * (slices - 1) / slices
