"""The stories of ``gsm-mini``: one function a template, in the order of their shapes.

A function draws the numbers, writes the reasoning graph ``g`` step by step, and returns
the sentences of the question; ``n`` is the number of steps. The order of the draws is
part of every problem: another order makes other problems from the same seed.
"""

from __future__ import annotations

from rlreason.tasks.story_kit import (
    COLORS,
    DAYS,
    GAINS,
    LOSSES,
    PARTS,
    TEMPLATES,
    TIMES,
    Draw,
    Graph,
    Redraw,
    she,
    template,
)

__all__ = ["TEMPLATES"]


# --- Chains: one quantity changes step by step -------------------------------------


@template("chain", 1, 8)
def gains_and_losses(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    now = start = d.num(5, d.big)
    told = [f"{who} has {start} {thing}."]
    changes = []
    for i in range(n):
        draw = d.last if i == n - 1 else d.num
        if now > 6 and d.coin():
            x = draw(2, now - 2)
            changes.append(-x)
            told.append(f"{she(who)} {d.pick(LOSSES)} {x}.")
            now -= x
        else:
            x = draw(2, d.big)
            changes.append(x)
            told.append(f"{she(who)} {d.pick(GAINS)} {x}.")
            now += x
    # Gains and losses commute as long as nothing falls below zero.
    if n > 1 and d.coin():
        changes.sort(key=lambda x: x < 0)
    now = start
    for x in changes:
        now = g(now, "+" if x > 0 else "-", abs(x), f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {who} have now?"]


@template("chain", 2, 8)
def bus_stops(d: Draw, g: Graph, n: int) -> list[str]:
    place = d.pick(("bus", "train", "boat"))
    now = start = d.num(8, d.big + 8)
    told = [f"A {place} has {start} people."]
    steps = []
    for i in range(n):
        draw = d.last if i == n - 1 else d.num
        if i % 2 == 0 and now > 4:
            x = draw(2, now - 2)
            told.append(f"At a stop {x} people get off.")
            steps.append(("-", x))
            now -= x
        else:
            x = draw(2, d.big)
            told.append(f"Then {x} people get on.")
            steps.append(("+", x))
            now += x
    if d.coin():
        steps.sort()
    now = start
    for op, x in steps:
        now = g(now, op, x, f"The {place} has %s people.")
    return [*told, f"How many people are on the {place} now?"]


@template("chain", 2, 4)
def weekly_savings(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    pay, weeks = d.num(3, d.small + 6), d.num(2, d.small)
    told = [f"{who} saves ${pay} each week for {weeks} weeks."]
    saved = g(pay, "*", weeks, f"{who} saves $%s.")
    gift = d.num(5, d.big)
    if n == 2:
        told.insert(0, f"{who} has ${gift}.")
        g(saved, "+", gift, f"{who} has $%s.")
    else:
        cost = d.num(2, pay * weeks - 1)
        toy = d.last(2, cost + gift) if n == 4 else 0
        told.insert(0, f"{who} has ${gift}.")
        told.append(f"{she(who)} buys a book for ${cost}.")
        if d.coin():
            total = g(saved, "+", gift, f"{who} has $%s.")
            left = g(total, "-", cost, f"{who} has $%s left.")
        else:
            left = g(saved, "-", cost, f"{who} keeps $%s.")
            left = g(left, "+", gift, f"{who} has $%s.")
        if n == 4:
            toy = min(toy, left - 1) if left > 2 else 1
            told.append(f"{she(who)} also buys a toy for ${toy}.")
            g(left, "-", toy, f"{who} has $%s left.")
    return [*told, f"How much money does {who} have now?"]


@template("chain", 1, 6)
def more_and_fewer(d: Draw, g: Graph, n: int) -> list[str]:
    names, thing = d.people(n + 1), d.thing()
    now = d.num(6, d.big)
    told = [f"{names[0]} has {now} {thing}."]
    for i in range(n):
        before, who = names[i], names[i + 1]
        draw = d.last if i == n - 1 else d.num
        if now > 6 and d.coin():
            x = draw(2, now - 2)
            told.append(f"{who} has {x} fewer than {before}.")
            now = g(now, "-", x, f"{who} has %s {thing}.")
        else:
            x = draw(2, d.big)
            told.append(f"{who} has {x} more than {before}.")
            now = g(now, "+", x, f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {names[n]} have?"]


@template("chain", 2, 5)
def times_and_more(d: Draw, g: Graph, n: int) -> list[str]:
    names, thing = d.people(n + 1), d.thing()
    now = d.num(3, d.big)
    told = [f"{names[0]} has {now} {thing}."]
    for i in range(n):
        before, who = names[i], names[i + 1]
        draw = d.last if i == n - 1 else d.num
        if i % 2 == 0 and now < 150:
            k = d.num(2, 5)
            told.append(f"{who} has {TIMES[k]} as many as {before}.")
            now = g(now, "*", k, f"{who} has %s {thing}.")
        else:
            x = draw(2, min(d.big, now - 1))
            told.append(f"{who} has {x} fewer than {before}.")
            now = g(now, "-", x, f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {names[n]} have?"]


@template("chain", 2, 4)
def gives_a_part(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    part = d.pick((2, 2, 3, 4, 5))
    start = part * d.num(2, max(3, d.big // 2))
    told = [
        f"{who} has {start} {thing}.",
        f"{she(who)} gives {PARTS[part]} of them to a friend.",
    ]
    given = g(start, "/", part, f"{who} gives away %s {thing}.")
    now = g(start, "-", given, f"{who} has %s left.")
    for i in range(n - 2):
        x = d.last(2, d.big)
        told.append(f"{'Then' if i == 0 else 'Later'} {she(who).lower()} buys {x}.")
        now = g(now, "+", x, f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {who} have now?"]


# --- Comparisons: quantities stand in relation to each other ------------------------


@template("comparison", 2, 4)
def more_together(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b, c), thing = d.people(3), d.thing()
    x, y = d.num(4, d.big), d.num(2, d.big)
    told = [f"{a} has {x} {thing}.", f"{b} has {y} more than {a}."]
    second = g(x, "+", y, f"{b} has %s {thing}.")
    if n == 2:
        g(second, "+", x, f"Together they have %s {thing}.")
        return [*told, f"How many {thing} do {a} and {b} have together?"]
    if n == 3:
        z = d.last(2, d.big)
        told.append(f"{c} has {z} {thing}.")
        first, other = (x, z) if d.coin() else (z, x)
        two = g(second, "+", first, f"Two of them have %s {thing}.")
        g(two, "+", other, f"Together they have %s {thing}.")
    else:
        z = d.last(2, x + y - 1)
        told.append(f"{c} has {z} fewer than {b}.")
        third = g(second, "-", z, f"{c} has %s {thing}.")
        first, other = (x, third) if d.coin() else (third, x)
        two = g(second, "+", first, f"Two of them have %s {thing}.")
        g(two, "+", other, f"Together they have %s {thing}.")
    return [*told, f"How many {thing} do {a}, {b} and {c} have together?"]


@template("comparison", 2, 3)
def times_together(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    k, x = d.num(2, 5), d.num(3, d.big)
    told = [f"{a} has {x} {thing}.", f"{b} has {TIMES[k]} as many as {a}."]
    if n == 3:
        y = d.last(2, x)
        told.append(f"{a} loses {y}." if d.coin() else f"{b} loses {y}.")
        loser = told[-1].split()[0]
        second = g(x, "*", k, f"{b} has %s {thing}.")
        if d.coin():
            kept = g(x if loser == a else second, "-", y, f"{loser} keeps %s.")
            g(kept, "+", second if loser == a else x, "Together they have %s.")
        else:
            both = g(second, "+", x, f"Together they had %s {thing}.")
            g(both, "-", y, f"Together they have %s {thing}.")
    else:
        second = g(x, "*", k, f"{b} has %s {thing}.")
        g(second, "+", x, f"Together they have %s {thing}.")
    return [*told, f"How many {thing} do {a} and {b} have together?"]


@template("comparison", 3)
def bags_compared(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    p, q = d.num(2, d.small), d.num(3, d.small)
    r, s = d.num(2, d.small), d.last(2, d.small)
    told = [f"{a} has {p} bags of {q} {thing}.", f"{b} has {r} bags of {s} {thing}."]
    first = g(p, "*", q, f"{a} has %s {thing}.")
    second = g(r, "*", s, f"{b} has %s {thing}.")
    if first < second:
        a, b, first, second = b, a, second, first
    g(first, "-", second, f"{a} has %s more {thing}.")
    return [*told, f"How many more {thing} does {a} have than {b}?"]


@template("comparison", 2, 4)
def ages(d: Draw, g: Graph, n: int) -> list[str]:
    a, b, c = d.people(3)
    x, y = d.num(4, d.big), d.num(2, d.small)
    told = [f"{a} is {x} years old.", f"{b} is {y} years older than {a}."]
    second = g(x, "+", y, f"{b} is %s years old.")
    k = d.num(2, 3)
    if n == 2:
        z = d.last(2, d.big)
        g(second, "+", z, f"{b} will be %s years old.")
        return [*told, f"How old will {b} be in {z} years?"]
    told.append(f"{c} is {TIMES[k]} as old as {b}.")
    third = g(second, "*", k, f"{c} is %s years old.")
    if n == 3:
        z = d.last(2, d.big)
        g(third, "+", z, f"{c} will be %s years old.")
        return [*told, f"How old will {c} be in {z} years?"]
    first, other = (x, third) if d.coin() else (third, x)
    two = g(second, "+", first, "Two of the ages make %s.")
    g(two, "+", other, "All the ages make %s.")
    return [*told, f"What is the sum of the ages of {a}, {b} and {c}?"]


@template("comparison", 2, 3)
def half_as_many(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    part = d.pick((2, 2, 3, 4))
    x = part * d.num(2, d.big // 2 + 1)
    told = [f"{a} has {x} {thing}.", f"{b} has {PARTS[part]} as many as {a}."]
    second = g(x, "/", part, f"{b} has %s {thing}.")
    if n == 2:
        g(second, "+", x, f"Together they have %s {thing}.")
    else:
        y = d.last(2, d.big)
        told.append(f"{b} buys {y} more.")
        if d.coin():
            second = g(second, "+", y, f"{b} has %s {thing}.")
            g(second, "+", x, f"Together they have %s {thing}.")
        else:
            both = g(second, "+", x, f"Together they had %s {thing}.")
            g(both, "+", y, f"Together they have %s {thing}.")
    return [*told, f"How many {thing} do {a} and {b} have together?"]


@template("comparison", 3)
def gives_and_compares(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    x, y = d.num(6, d.big), d.num(6, d.big)
    z = d.last(2, x - 2)
    told = [
        f"{a} has {x} {thing} and {b} has {y} {thing}.",
        f"{a} gives {z} {thing} to {b}.",
    ]
    first = g(x, "-", z, f"{a} has %s {thing}.")
    second = g(y, "+", z, f"{b} has %s {thing}.")
    if first > second:
        a, b, first, second = b, a, second, first
    g(second, "-", first, f"{b} has %s more {thing}.")
    return [*told, f"How many more {thing} does {b} have than {a} now?"]


# --- Totals: parts make a whole ----------------------------------------------------


@template("total", 3, 5)
def shopping(d: Draw, g: Graph, n: int) -> list[str]:
    who, (one, two) = d.person(), d.things(2)
    a, p = d.num(2, d.small), d.num(2, d.small)
    b, q = d.num(2, d.small), d.num(2, d.small)
    told = [
        f"{who} buys {a} {one} for ${p} each.",
        f"{she(who)} buys {b} {two} for ${q} each.",
    ]
    first = g(a, "*", p, f"The {one} cost $%s.")
    second = g(b, "*", q, f"The {two} cost $%s.")
    total = g(first, "+", second, "The total is $%s.")
    if n == 3:
        return [*told, f"How much does {who} spend?"]
    fee = d.num(2, d.big)
    told.append(f"{she(who)} also buys a bag for ${fee}.")
    total = g(total, "+", fee, "With the bag it is $%s.")
    if n == 4:
        return [*told, f"How much does {who} spend?"]
    paid = total + d.last(1, d.big)
    told.append(f"{she(who)} pays with ${paid}.")
    g(paid, "-", total, f"{who} gets $%s back.")
    return [*told, f"How much money does {who} get back?"]


@template("total", 2, 4)
def change_back(d: Draw, g: Graph, n: int) -> list[str]:
    who, (one, _two) = d.person(), d.things(2)
    a, p = d.num(2, d.small), d.num(2, d.small)
    told = [f"{who} buys {a} {one} for ${p} each."]
    total = g(a, "*", p, f"The {one} cost $%s.")
    if n >= 3:
        q = d.num(2, d.big)
        told.append(f"{she(who)} buys a cake for ${q}.")
        if n == 3 or d.coin():
            total = g(total, "+", q, "The total is $%s.")
            rest = []
        else:
            rest = [q]
        if n == 4:
            r = d.num(2, d.big)
            told.append(f"{she(who)} buys a lamp for ${r}.")
            total = g(total, "+", r, "Together it is $%s.")
            for q in rest:
                total = g(total, "+", q, "The total is $%s.")
    paid = total + d.last(1, d.big)
    told.append(f"{she(who)} pays with ${paid}.")
    g(paid, "-", total, f"{who} gets $%s back.")
    return [*told, f"How much money does {who} get back?"]


@template("total", 1, 6)
def sum_of_days(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    first_day = d.below(7)
    verb = d.pick(("sells", "makes", "finds", "picks"))
    counts = [d.num(2, d.big) for _ in range(n)] + [d.last(2, d.big)]
    told = [
        f"On {DAYS[(first_day + i) % 7]} {who} {verb} {x} {thing}."
        for i, x in enumerate(counts)
    ]
    if d.coin():
        start = d.below(n + 1)
        counts = counts[start:] + counts[:start]
    total = counts[0]
    for x in counts[1:]:
        total = g(total, "+", x, "The sum is %s.")
    return [*told, f"How many {thing} is that in all?"]


@template("total", 2, 3)
def rows_and_extras(d: Draw, g: Graph, n: int) -> list[str]:
    thing = d.thing()
    r, c, x = d.num(2, d.small), d.num(2, d.small + 3), d.num(2, d.big)
    told = [f"A shop has {r} rows of {c} {thing}.", f"There are {x} more in a box."]
    total = g(r, "*", c, "The rows hold %s.")
    if n == 2:
        g(total, "+", x, f"There are %s {thing}.")
        return [*told, f"How many {thing} does the shop have?"]
    y = d.last(2, min(d.big, r * c - 1))
    told.append(f"The shop sells {y} {thing}.")
    if d.coin():
        total = g(total, "+", x, f"There are %s {thing}.")
        g(total, "-", y, "There are %s left.")
    else:
        total = g(total, "-", y, "There are %s left.")
        g(total, "+", x, f"There are %s {thing}.")
    return [*told, f"How many {thing} does the shop have left?"]


@template("total", 3, 5)
def boxes_and_bags(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    a, p = d.num(2, d.small), d.num(2, d.small)
    b, q = d.num(2, d.small), d.num(2, d.small)
    told = [
        f"{who} has {a} boxes with {p} {thing} each.",
        f"{she(who)} has {b} bags with {q} {thing} each.",
    ]
    first = g(a, "*", p, f"The boxes hold %s {thing}.")
    second = g(b, "*", q, f"The bags hold %s {thing}.")
    total = g(first, "+", second, f"{who} has %s {thing}.")
    if n >= 4:
        x = d.num(2, min(d.big, a * p + b * q - 2))
        told.append(f"{she(who)} gives away {x}.")
        total = g(total, "-", x, f"{who} has %s left.")
    if n == 5:
        y = d.last(2, d.big)
        told.append(f"{she(who)} finds {y}.")
        g(total, "+", y, f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {who} have?"]


@template("total", 2, 4)
def teams(d: Draw, g: Graph, n: int) -> list[str]:
    groups, size = d.num(2, d.small), d.num(n + 1, d.small + 3)
    left, counts = groups * size, []
    for i in range(n - 1):
        x = d.num(2, max(2, min(d.big, left - 2 * (n - i))))
        counts.append(x)
        left -= x
    counts.append(left)
    names = d.people(n)
    told = [
        f"The class of {who} has {x} students."
        for who, x in zip(names, counts, strict=False)
    ]
    if d.coin():
        counts.reverse()
    total = counts[0]
    for x in counts[1:]:
        total = g(total, "+", x, "There are %s students.")
    g(total, "/", groups, "Each team has %s students.")
    told.append(f"All students form {groups} equal teams.")
    return [*told, "How many students are in each team?"]


@template("total", 3, 5)
def tickets(d: Draw, g: Graph, n: int) -> list[str]:
    a, p = d.num(2, d.small), d.num(4, d.small + 6)
    b, q = d.num(2, d.small), d.num(2, d.small)
    told = [
        f"A show costs ${p} for an adult and ${q} for a child.",
        f"A group has {a} adults and {b} children.",
    ]
    first = g(a, "*", p, "The adults pay $%s.")
    second = g(b, "*", q, "The children pay $%s.")
    if n == 3:
        g(first, "+", second, "The group pays $%s.")
        return [*told, "How much does the group pay?"]
    food = d.last(2, d.big)
    told.append(f"They also spend ${food} on food.")
    order = [first, second, food]
    if d.coin():
        order = order[1:] + order[:1]
    total = g(order[0], "+", order[1], "Together it is $%s.")
    total = g(total, "+", order[2], "The group pays $%s.")
    if n == 5:
        k = d.pick((2, 3))
        told.append(f"They go to the show {TIMES[k]}." if k == 3 else "They go twice.")
        g(total, "*", k, "In all they pay $%s.")
    return [*told, "How much does the group pay?"]


@template("total", 2, 4)
def sales_grow(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    x, y, k = d.num(3, d.big), d.num(2, d.big), d.num(2, 3)
    told = [
        f"{who} sells {x} {thing} on Monday.",
        f"On Tuesday {she(who).lower()} sells {y} more than on Monday.",
    ]
    tuesday = g(x, "+", y, f"On Tuesday {who} sells %s.")
    if n == 2:
        g(tuesday, "+", x, f"In all {who} sells %s.")
        return [*told, f"How many {thing} does {who} sell in all?"]
    if n == 3:
        z = d.last(2, d.big)
        told.append(f"On Friday {she(who).lower()} sells {z}.")
        third = z
    else:
        told.append(
            f"On Friday {she(who).lower()} sells {TIMES[k]} as many as on Tuesday."
        )
        third = g(tuesday, "*", k, f"On Friday {who} sells %s.")
    first, other = (x, third) if d.coin() else (third, x)
    two = g(tuesday, "+", first, "Two days make %s.")
    g(two, "+", other, f"In all {who} sells %s.")
    return [*told, f"How many {thing} does {who} sell in all?"]


# --- Rates: so much each -----------------------------------------------------------


@template("rate", 1, 4)
def hours_of_work(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    pay, hours = d.num(3, d.small + 5), d.num(2, d.small)
    told = [f"{who} earns ${pay} an hour and works {hours} hours a day."]
    if n == 1:
        g(pay, "*", hours, f"{who} earns $%s a day.")
        return [*told, f"How much does {who} earn in a day?"]
    days = d.num(2, 4)
    told.append(f"{she(who)} works {days} days.")
    if d.coin():
        daily = g(pay, "*", hours, f"{who} earns $%s a day.")
        total = g(daily, "*", days, f"{who} earns $%s.")
    else:
        worked = g(hours, "*", days, f"{who} works %s hours.")
        total = g(worked, "*", pay, f"{who} earns $%s.")
    if n == 2:
        return [*told, f"How much does {who} earn?"]
    cost = d.num(2, min(d.big, total - 2))
    told.append(f"{she(who)} spends ${cost} on food.")
    left = g(total, "-", cost, f"{who} keeps $%s.")
    if n == 4:
        gift = d.last(2, d.big)
        told.append(f"{she(who)} gets a gift of ${gift}.")
        g(left, "+", gift, f"{who} has $%s.")
    return [*told, f"How much money does {who} have left?"]


@template("rate", 3, 5)
def two_legs(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    v, t = d.num(3, d.small + 6), d.num(2, d.small)
    w, u = d.num(3, d.small + 6), d.last(2, d.small)
    told = [
        f"{who} rides at {v} miles an hour for {t} hours.",
        f"Then {she(who).lower()} rides at {w} miles an hour for {u} hours.",
    ]
    first = g(v, "*", t, f"First {who} rides %s miles.")
    second = g(w, "*", u, f"Then {who} rides %s miles.")
    total = g(first, "+", second, f"{who} rides %s miles.")
    if n >= 4:
        walk = d.num(2, d.small)
        told.append(f"At last {she(who).lower()} walks {walk} miles.")
        total = g(total, "+", walk, f"{who} goes %s miles.")
    if n == 5:
        told.append("The way back is just as long.")
        g(total, "*", 2, "Both ways are %s miles.")
    return [*told, f"How many miles does {who} go in all?"]


@template("rate", 2, 4)
def pages_left(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    p, days = d.num(3, d.small + 6), d.num(2, d.small)
    extra = d.num(0, d.big) if n >= 3 else 0
    pages = p * days + extra + d.last(2, d.big)
    told = [
        f"{who} has a book of {pages} pages.",
        f"{she(who)} reads {p} pages a day for {days} days.",
    ]
    read = g(p, "*", days, f"{who} reads %s pages.")
    if n >= 3:
        extra = max(extra, 2)
        told.append(f"On Sunday {she(who).lower()} reads {extra} pages.")
        if pages <= read + extra:
            raise Redraw
        if d.coin():
            read = g(read, "+", extra, f"In all {who} reads %s pages.")
            left = g(pages, "-", read, "There are %s pages left.")
        else:
            left = g(pages, "-", read, "There are %s pages left.")
            left = g(left, "-", extra, "There are %s pages left.")
    else:
        left = g(pages, "-", read, "There are %s pages left.")
    if n == 4:
        told.append("Each page left takes 2 minutes.")
        g(left, "*", 2, "It takes %s minutes.")
        return [*told, f"How many minutes does {who} still need?"]
    return [*told, f"How many pages does {who} have left?"]


@template("rate", 2, 3)
def unit_price(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    a, price, b = d.num(2, d.small), d.num(2, d.small + 3), d.num(2, d.small)
    told = [f"{a} {thing} cost ${a * price}."]
    each = g(a * price, "/", a, "Each costs $%s.")
    cost = g(each, "*", b, f"{b} {thing} cost $%s.")
    if n == 2:
        return [*told, f"How much do {b} {thing} cost?"]
    money = cost + d.last(1, d.big)
    told.append(f"{who} has ${money} and buys {b} {thing}.")
    g(money, "-", cost, f"{who} has $%s left.")
    return [*told, f"How much money does {who} have left?"]


@template("rate", 2, 4)
def machines(d: Draw, g: Graph, n: int) -> list[str]:
    thing = d.thing()
    m, rate, hours = d.num(2, 5), d.num(2, d.small), d.num(2, 5)
    told = [
        f"A factory has {m} machines.",
        f"Each machine makes {rate} {thing} an hour.",
    ]
    if d.coin():
        hourly = g(m, "*", rate, f"The machines make %s {thing} an hour.")
        total = g(hourly, "*", hours, f"They make %s {thing}.")
    else:
        each = g(rate, "*", hours, f"Each machine makes %s {thing}.")
        total = g(each, "*", m, f"They make %s {thing}.")
    told.append(f"They run for {hours} hours.")
    if n >= 3:
        bad = d.num(2, min(d.big, total - 1))
        told.append(f"{bad} {thing} are broken.")
        total = g(total, "-", bad, f"%s {thing} are good.")
    if n == 4:
        more = d.last(2, d.big)
        told.append(f"{more} good {thing} come from a shop.")
        g(total, "+", more, f"There are %s good {thing}.")
    return [*told, f"How many good {thing} are there?"]


@template("rate", 3, 4)
def tank(d: Draw, g: Graph, n: int) -> list[str]:
    inflow = d.num(4, d.small + 6)
    out, minutes = d.num(2, inflow - 2), d.num(2, d.small)
    start = d.last(2, d.big)
    told = [
        f"A tank holds {start} gallons of water.",
        f"Each minute {inflow} gallons flow in and {out} flow out.",
    ]
    if n == 3:
        net = g(inflow, "-", out, "Each minute it gains %s gallons.")
        gain = g(net, "*", minutes, "In all it gains %s gallons.")
        g(start, "+", gain, "The tank holds %s gallons.")
    else:
        gain = g(inflow, "*", minutes, "%s gallons flow in.")
        loss = g(out, "*", minutes, "%s gallons flow out.")
        if d.coin():
            net = g(gain, "-", loss, "In all it gains %s gallons.")
            g(start, "+", net, "The tank holds %s gallons.")
        else:
            full = g(start, "+", gain, "That makes %s gallons.")
            g(full, "-", loss, "The tank holds %s gallons.")
    return [*told, f"How many gallons does it hold after {minutes} minutes?"]


@template("rate", 2, 3)
def equal_shares(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    friends, share = d.num(2, 6), d.num(2, d.small + 3)
    total = friends * share
    boxes = [b for b in range(2, 10) if total % b == 0 and total // b > 1]
    if not boxes:
        raise Redraw
    b = d.pick(boxes)
    told = [
        f"{who} has {b} boxes with {total // b} {thing} each.",
        f"{she(who)} shares them equally among {friends} friends.",
    ]
    held = g(b, "*", total // b, f"{who} has %s {thing}.")
    each = g(held, "/", friends, f"Each friend gets %s {thing}.")
    if n == 3:
        x = d.last(2, d.big)
        told.append(f"One friend, Sam, had {x} {thing} before.")
        g(each, "+", x, f"Sam has %s {thing}.")
        return [*told, f"How many {thing} does Sam have now?"]
    return [*told, f"How many {thing} does each friend get?"]


@template("rate", 2, 3)
def saving_goal(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    rate, weeks = d.num(2, d.small), d.num(2, d.small)
    has = d.last(2, d.big)
    told = [f"{who} wants a bike for ${has + rate * weeks}."]
    if n == 2:
        told += [f"{she(who)} has ${has}."]
        need = g(has + rate * weeks, "-", has, f"{who} needs $%s more.")
    else:
        gift = d.num(2, d.big)
        told = [f"{who} wants a bike for ${has + gift + rate * weeks}."]
        told += [f"{she(who)} has ${has} and gets a gift of ${gift}."]
        price = has + gift + rate * weeks
        if d.coin():
            own = g(has, "+", gift, f"{who} has $%s.")
            need = g(price, "-", own, f"{who} needs $%s more.")
        else:
            need = g(price, "-", has, f"{who} needs $%s more.")
            need = g(need, "-", gift, f"{who} needs $%s more.")
    told.append(f"{she(who)} saves ${rate} a week.")
    g(need, "/", rate, "It takes %s weeks.")
    return [*told, f"How many weeks does {who} need to save?"]


@template("rate", 3, 4)
def farm_sales(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    workers, each, price = d.num(2, 5), d.num(3, d.small), d.num(2, 4)
    total = workers * each
    kept = d.num(2, total - 2)
    told = [f"{workers} workers pick {each} {thing} each."]
    told.append(f"{who} keeps {kept} {thing} and sells the rest for ${price} each.")
    picked = g(workers, "*", each, f"They pick %s {thing}.")
    rest = g(picked, "-", kept, f"{who} sells %s {thing}.")
    money = g(rest, "*", price, f"{who} earns $%s.")
    if n == 4:
        had = d.last(2, d.big)
        told.append(f"{who} had ${had} before.")
        g(money, "+", had, f"{who} has $%s.")
        return [*told, f"How much money does {who} have now?"]
    return [*told, f"How much money does {who} earn?"]


# --- Change over time --------------------------------------------------------------


@template("change", 2, 4)
def growing_plant(d: Draw, g: Graph, n: int) -> list[str]:
    rate, weeks, start = d.num(2, d.small), d.num(2, d.small), d.num(4, d.big)
    told = [f"A tree is {start} feet tall.", f"It grows {rate} feet a year."]
    grown = g(rate, "*", weeks, "It grows %s feet.")
    ask = f"How tall is the tree after {weeks} years?"
    if n == 2:
        g(grown, "+", start, "The tree is %s feet tall.")
    else:
        cut = d.num(2, rate * weeks + start - 2)
        told.append(f"After {weeks} years {cut} feet are cut.")
        ask = "How tall is the tree then?"
        tall = g(grown, "+", start, "The tree is %s feet tall.")
        tall = g(tall, "-", cut, "After the cut it is %s feet tall.")
        if n == 4:
            more = d.last(2, d.big)
            told.append(f"Then it grows {more} feet.")
            g(tall, "+", more, "The tree is %s feet tall.")
    return [*told, ask]


@template("change", 1, 4)
def doubling(d: Draw, g: Graph, n: int) -> list[str]:
    k = 2 if n > 2 else d.num(2, 3)
    start = d.last(2, d.big)
    period = d.pick(("hour", "day", "week", "year"))
    word = {2: "doubles", 3: "triples"}[k]
    now = start
    for _ in range(n):
        now = g(now, "*", k, "There are %s ants.")
    span = f"{n} {period}s" if n > 1 else f"1 {period}"
    return [
        f"A nest has {start} ants.",
        f"The number of ants {word} every {period}.",
        f"How many ants are there after {span}?",
    ]


@template("change", 2, 6)
def temperature(d: Draw, g: Graph, n: int) -> list[str]:
    now = d.num(30, 30 + d.big)
    told = [f"In the morning it is {now} degrees."]
    start_day = d.below(5)
    for i in range(n):
        draw = d.last if i == n - 1 else d.num
        when = f"On {DAYS[(start_day + i) % 7]}"
        if d.coin():
            x = draw(2, min(d.big, now - 2))
            told.append(f"{when} it falls {x} degrees.")
            now = g(now, "-", x, f"{when} it is %s degrees.")
        else:
            x = draw(2, d.big)
            told.append(f"{when} it rises {x} degrees.")
            now = g(now, "+", x, f"{when} it is %s degrees.")
    return [*told, "How many degrees is it then?"]


@template("change", 2, 6)
def more_each_day(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    start, step = d.num(3, d.big), d.last(2, d.small)
    told = [
        f"{who} makes {start} {thing} on the first day.",
        f"Each day {she(who).lower()} makes {step} more than the day before.",
    ]
    if n % 2:
        # One sum a day reaches day n + 1 itself.
        now = start
        for _ in range(n):
            now = g(now, "+", step, f"The next day {who} makes %s.")
        return [*told, f"How many {thing} does {who} make on day {n + 1}?"]
    days = n // 2 + 1
    counts = [start]
    for _ in range(days - 1):
        counts.append(g(counts[-1], "+", step, f"The next day {who} makes %s."))
    if d.coin():
        counts.reverse()
    total = counts[0]
    for x in counts[1:]:
        total = g(total, "+", x, "The sum is %s.")
    return [*told, f"How many {thing} does {who} make in {days} days?"]


@template("change", 2, 4)
def bank(d: Draw, g: Graph, n: int) -> list[str]:
    who = d.person()
    deposit, months, start = d.num(3, d.small + 6), d.num(2, d.small), d.num(5, d.big)
    told = [
        f"{who} has ${start} in the bank.",
        f"{she(who)} puts in ${deposit} each month for {months} months.",
    ]
    paid = g(deposit, "*", months, f"{who} puts in $%s.")
    if n == 2:
        g(paid, "+", start, f"{who} has $%s.")
    else:
        out = d.num(2, min(d.big, deposit * months - 1))
        told.append(f"{she(who)} takes out ${out}.")
        if d.coin():
            now = g(paid, "+", start, f"{who} has $%s.")
            now = g(now, "-", out, f"{who} has $%s left.")
        else:
            now = g(paid, "-", out, "The bank gains $%s.")
            now = g(now, "+", start, f"{who} has $%s.")
        if n == 4:
            more = d.last(2, d.big)
            told.append(f"At the end the bank adds ${more}.")
            g(now, "+", more, f"{who} has $%s.")
    return [*told, f"How much money does {who} have in the bank?"]


@template("change", 3, 4)
def candle(d: Draw, g: Graph, n: int) -> list[str]:
    burn, hours, days = d.num(2, 5), d.num(2, 5), d.num(2, 5)
    left = d.last(2, d.big)
    length = burn * hours * days + left
    told = [
        f"A candle is {length} inches long.",
        f"It burns {burn} inches an hour for {hours} hours a day.",
    ]
    if d.coin():
        daily = g(burn, "*", hours, "Each day it burns %s inches.")
        burned = g(daily, "*", days, "In all it burns %s inches.")
    else:
        total = g(hours, "*", days, "It burns for %s hours.")
        burned = g(total, "*", burn, "In all it burns %s inches.")
    rest = g(length, "-", burned, "The candle has %s inches left.")
    if n == 4:
        k = d.num(2, 4)
        told.append(f"There are {k} such candles.")
        g(rest, "*", k, "All candles have %s inches left.")
        return [*told, f"How many inches are left of all after {days} days?"]
    return [*told, f"How many inches are left after {days} days?"]


# --- Distractors: the story tells more than the question needs ----------------------


@template("distractor", 1, 2)
def colors(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    start = d.below(6)
    one, two, three = (COLORS[(start + i) % 6] for i in range(3))
    x, y, z = d.num(2, d.big), d.num(2, d.big), d.last(2, d.big)
    told = [f"{who} has {x} {one}, {y} {two} and {z} {three} {thing}."]
    if n == 1:
        g(x, "+", z, f"{who} has %s {one} and {three} {thing}.")
        return [*told, f"How many {one} and {three} {thing} does {who} have?"]
    lost = d.num(2, x)
    told.append(f"{she(who)} loses {lost} {one} {thing}.")
    if d.coin():
        kept = g(x, "-", lost, f"{who} has %s {one} {thing}.")
        g(kept, "+", y, f"{who} has %s {one} and {two} {thing}.")
    else:
        both = g(x, "+", y, f"{who} had %s {one} and {two} {thing}.")
        g(both, "-", lost, f"{who} has %s {one} and {two} {thing}.")
    return [*told, f"How many {one} and {two} {thing} does {who} have now?"]


@template("distractor", 1, 4)
def only_one_person(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    x, y = d.num(6, d.big), d.num(6, d.big)
    told = [f"{a} has {x} {thing} and {b} has {y} {thing}."]
    now = x
    for i in range(n):
        draw = d.last if i == n - 1 else d.num
        if now > 6 and d.coin():
            z = draw(2, now - 2)
            told.append(f"{a} {d.pick(LOSSES)} {z}.")
            now = g(now, "-", z, f"{a} has %s {thing}.")
        else:
            z = draw(2, d.big)
            told.append(f"{a} {d.pick(GAINS)} {z}.")
            now = g(now, "+", z, f"{a} has %s {thing}.")
        if i == 0:
            told.append(f"{b} {d.pick(GAINS)} {d.num(2, d.big)}.")
    return [*told, f"How many {thing} does {a} have now?"]


@template("distractor", 2, 3)
def needless_price(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    boxes, each, price = d.num(2, d.small), d.num(2, d.small), d.num(2, d.big)
    told = [
        f"{who} buys {boxes} boxes of {each} {thing}.",
        f"Each box costs ${price}.",
    ]
    total = g(boxes, "*", each, f"{who} buys %s {thing}.")
    if n == 2:
        had = d.last(2, d.big)
        told.append(f"{she(who)} had {had} {thing} before.")
        g(total, "+", had, f"{who} has %s {thing}.")
    else:
        had, lost = d.num(2, d.big), d.last(2, boxes * each - 1)
        told.append(f"{she(who)} had {had} {thing} before and gives away {lost}.")
        if d.coin():
            now = g(total, "+", had, f"{who} has %s {thing}.")
            g(now, "-", lost, f"{who} has %s {thing} left.")
        else:
            now = g(total, "-", lost, f"{who} keeps %s {thing}.")
            g(now, "+", had, f"{who} has %s {thing}.")
    return [*told, f"How many {thing} does {who} have now?"]


@template("distractor", 2, 4)
def needless_age(d: Draw, g: Graph, n: int) -> list[str]:
    (a, b), thing = d.people(2), d.thing()
    age, x, y = d.num(5, 15), d.num(4, d.big), d.num(2, d.big)
    told = [f"{a} is {age} years old and has {x} {thing}."]
    told.append(f"{b} has {y} more {thing} than {a}.")
    second = g(x, "+", y, f"{b} has %s {thing}.")
    if n == 2:
        z = d.last(2, x + y - 1)
        told.append(f"{b} gives away {z}.")
        g(second, "-", z, f"{b} has %s {thing}.")
        return [*told, f"How many {thing} does {b} have now?"]
    both = g(second, "+", x, f"Together they have %s {thing}.")
    if n == 4:
        z = d.num(2, x + y - 1)
        told.append(f"They give away {z} {thing}.")
        both = g(both, "-", z, f"They have %s {thing} left.")
    w = d.last(2, d.big)
    told.append(f"They find {w} {thing}.")
    g(both, "+", w, f"They have %s {thing}.")
    return [*told, f"How many {thing} do they have together?"]


@template("distractor", 2, 3)
def lunch_break(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    rate, morning, noon = d.num(2, d.small), d.num(2, 5), d.num(2, 5)
    lunch = d.last(3, d.big)
    told = [f"{who} paints {rate} {thing} an hour."]
    told.append(f"{she(who)} works {morning} hours, eats lunch for ${lunch},")
    told.append(f"and works {noon} hours.")
    if n == 2:
        hours = g(morning, "+", noon, f"{who} works %s hours.")
        g(hours, "*", rate, f"{who} paints %s {thing}.")
    else:
        first = g(morning, "*", rate, f"First {who} paints %s {thing}.")
        second = g(noon, "*", rate, f"Then {who} paints %s {thing}.")
        g(first, "+", second, f"{who} paints %s {thing}.")
    return [*told, f"How many {thing} does {who} paint?"]


# --- Reversed: the unknown is not the last quantity --------------------------------


@template("reversed", 1, 3)
def start_unknown(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    left = d.num(2, d.big)
    told, now = [], left
    for i in range(n):
        x = (d.last if i == n - 1 else d.num)(2, d.big)
        told.append(f"{who} {d.pick(LOSSES)} {x} {thing}.")
        now = g(now, "+", x, f"Before that {who} had %s {thing}.")
    told.append(f"{she(who)} has {left} {thing} left.")
    return [*told, f"How many {thing} did {who} have at the start?"]


@template("reversed", 2)
def bags_unknown(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    each, bags, had = d.num(2, d.small), d.num(2, d.small), d.last(2, d.big)
    gained = g(had + each * bags, "-", had, f"{who} buys %s {thing}.")
    g(gained, "/", each, f"{who} buys %s bags.")
    return [
        f"{who} has {had} {thing}.",
        f"{she(who)} buys bags of {each} {thing}.",
        f"Now {she(who).lower()} has {had + each * bags} {thing}.",
        f"How many bags does {who} buy?",
    ]


@template("reversed", 1, 3)
def still_needed(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    parts = [d.num(2, d.big) for _ in range(n)]
    goal = sum(parts) + d.last(2, d.big)
    told = [f"{who} needs {goal} {thing}."]
    told += [f"{she(who)} {d.pick(GAINS)} {x} {thing}." for x in parts]
    if n > 1 and d.coin():
        has = parts[0]
        for x in parts[1:]:
            has = g(has, "+", x, f"{who} has %s {thing}.")
        g(goal, "-", has, f"{who} needs %s more.")
    else:
        for x in parts:
            goal = g(goal, "-", x, f"{who} needs %s more.")
    return [*told, f"How many more {thing} does {who} need?"]


@template("reversed", 2, 3)
def missing_part(d: Draw, g: Graph, n: int) -> list[str]:
    names, thing = d.people(n + 1), d.thing()
    parts = [d.num(2, d.big) for _ in range(n)]
    total = sum(parts) + d.last(2, d.big)
    told = [f"{', '.join(names[:-1])} and {names[-1]} have {total} {thing} together."]
    told += [f"{who} has {x}." for who, x in zip(names, parts, strict=False)]
    if d.coin():
        known = parts[0]
        for x in parts[1:]:
            known = g(known, "+", x, f"The others have %s {thing}.")
        g(total, "-", known, f"{names[-1]} has %s {thing}.")
    else:
        for x in parts:
            total = g(total, "-", x, f"That leaves %s {thing}.")
    return [*told, f"How many {thing} does {names[-1]} have?"]


@template("reversed", 2, 3)
def price_unknown(d: Draw, g: Graph, n: int) -> list[str]:
    who, thing = d.person(), d.thing()
    a, price, fee = d.num(2, d.small), d.num(2, d.small + 3), d.num(2, d.small)
    paid = a * price + fee
    told = [f"{who} pays ${paid} for {a} {thing} and a bag.", f"The bag costs ${fee}."]
    cost = g(paid, "-", fee, f"The {thing} cost $%s.")
    each = g(cost, "/", a, "Each costs $%s.")
    if n == 2:
        return [*told, f"How much does each of the {thing} cost?"]
    b = d.last(2, d.small)
    g(each, "*", b, f"{b} {thing} cost $%s.")
    return [*told, f"How much do {b} {thing} cost?"]
