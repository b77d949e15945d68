"""Random models by seed, against plain autograd: ``python tests/shared/fuzz.py --seeds START COUNT [--seconds S] [...]``.

Each seed gives a program from `grammar`. What is wrong is printed as a program that is as short as leaving out pieces makes
it, and that runs as it is. With ``--pieces`` each of these pieces stands alone between a layer and a head, once per seed.
"""

import argparse
import json
import os
import random
import select
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
import torch._dynamo  # once, not in each child
from grammar import PIECES, Program, random_program, single, smaller
from trials import PATHS, Case, Outcome, Trial, outcomes, text, trials

# how often a program takes a path
SHARE = {"eager": 1.0, "compile": 0.03, "threads": 0.15, "two losses": 0.15, "together": 0.3} | dict.fromkeys(
    ("subsampling", "chunk_size=1", "vmap", "grad", "jvp", "again", "shim"), 0.35
)


LIMIT = 120  # seconds for one program


def judged(program: Program, paths: list[str]) -> dict[tuple[str, str], tuple[Trial, Outcome]]:
    """Outcomes by path and quantity."""
    case = Case(program)
    found = {}
    for trial in trials(program, paths):
        for quantity, outcome in outcomes(case, trial).items():
            found[trial.path, quantity] = trial, outcome
    return found


def label(program: Program, path: str, outcome: Outcome) -> str:
    """The kind of outcome, which tells apart refusals that should not be."""
    return "refused although right" if outcome.kind == "refused" and not program.may_refuse(path) else outcome.kind


def defect(program: Program, path: str, outcome: Outcome) -> bool:
    """Whether an outcome should not be: right models are not refused, and errors say what to do."""
    return label(program, path, outcome) in ("wrong", "crashed", "refused although right")


def minimised(program: Program, path: str, quantity: str, kind: str, seconds: float = 10) -> tuple[Program, Trial, Outcome]:
    """The program without what the failure does not need."""
    until = time.monotonic() + seconds

    def failing(candidate: Program) -> tuple[Trial, Outcome] | None:
        try:
            case = Case(candidate)
            for trial in PATHS[path](candidate):
                if quantity in trial.quantities:
                    outcome = outcomes(case, trial)[quantity]
                    if outcome.kind == kind and defect(candidate, path, outcome):
                        return trial, outcome
        except Exception:
            return None
        return None

    found = failing(program)
    assert found is not None, "the failure does not repeat"
    (trial, outcome), again = found, True
    while again and time.monotonic() < until:
        again = False
        for candidate in smaller(program):
            if (found := failing(candidate)) is not None:
                program, (trial, outcome), again = candidate, found, True
                break
    return program, trial, outcome


def waited(file: Any, child: int) -> bool:
    """Whether a child answers: within the limit, and not after 15 seconds in which it did not compute (a deadlock)."""
    before, idle = "", 0
    for _ in range(LIMIT // 5):
        if select.select([file], [], [], 5)[0]:
            return True
        try:
            with open(f"/proc/{child}/stat") as stat:
                times = " ".join(stat.read().rpartition(")")[2].split()[11:13])
        except OSError:  # not Linux
            continue
        before, idle = times, idle + 1 if times == before else 0
        if idle == 3:
            return False
    return False


class Tally:
    """Counts of outcomes, and one short program for each kind of failure."""

    def __init__(self, known: Iterable[tuple[Any, ...]] = ()) -> None:
        self.known = list(known)
        self.models, self.invalid = 0, Counter[str]()
        self.by_quantity: dict[str, Counter[str]] = defaultdict(Counter)
        self.by_piece: dict[str, Counter[str]] = defaultdict(Counter)
        self.failures: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(self, seed: int, program: Program, paths: list[str], show: bool = True) -> None:
        """Run one program."""
        try:
            found = judged(program, paths)
        except Exception as error:
            self.invalid[f"{'+'.join(program.pieces)}: {type(error).__name__}: {str(error)[:160]}"] += 1
            return
        self.models += 1
        worst: dict[str, tuple[str, str, Outcome]] = {}
        for (path, quantity), (_, outcome) in found.items():
            self.by_quantity[f"{path} {quantity}"][label(program, path, outcome)] += 1
            if defect(program, path, outcome):
                worst.setdefault(outcome.kind, (path, quantity, outcome))
        kinds = {label(program, path, o) for (path, _), (_, o) in found.items() if path not in ("two losses", "threads")}
        for name in program.pieces:
            if PIECES[name].group != "frame":
                self.by_piece[name].update(kinds & {"wrong", "crashed", "refused although right", "refused"} or {"right"})
        for kind, (path, quantity, _) in worst.items():
            self.note(seed, program, path, quantity, kind, show)

    def note(self, seed: int, program: Program, path: str, quantity: str, kind: str, show: bool) -> None:
        """Keep a failure's short program, one for each set of pieces, path and kind."""
        for key in self.known:
            if (kind, path) == (key[0], key[2]) and set(key[1]) <= set(program.pieces):  # one of its kind was shown
                self.failures[key] = {"kind": kind, "pieces": list(key[1]), "path": path, "count": 1}
                return
        try:
            short, trial, outcome = minimised(program, path, quantity, kind)
        except AssertionError as error:
            short, trial, outcome = program, next(iter(PATHS[path](program))), Outcome(kind, str(error))
        pieces = [p for p in short.pieces if PIECES[p].group != "frame"]
        key = (kind, tuple(pieces or short.pieces), path)
        if key in self.failures:
            self.failures[key]["count"] += 1
            return
        self.failures[key] = {
            "seed": seed, "kind": kind, "pieces": list(key[1]), "path": path, "quantity": quantity, "count": 1,
            "detail": outcome.detail, "program": text(short, trial),
        }  # fmt: skip
        if show and kind == "wrong":
            print(f"\n# ---- seed {seed}: {kind}, {path}, {quantity}: {outcome.detail}\n{text(short, trial)}", flush=True)

    def add_in_child(self, seed: int, program: Program, paths: list[str], show: bool = True) -> None:
        """As `add`, in a process of its own: what hangs in C, or leaves something behind, concerns no other program."""
        read, write = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            os.close(read)
            tally = Tally(self.failures)
            tally.add(seed, program, paths, show)
            with os.fdopen(write, "w") as file:
                json.dump(tally.report(), file)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            ended = waited(file, child)
            if not ended:
                os.kill(child, signal.SIGKILL)
            answer = file.read()
        os.waitpid(child, 0)
        if answer:
            self.merge(json.loads(answer))
        else:
            self.models += 1
            pieces = [p for p in program.pieces if PIECES[p].group != "frame"]
            for name in pieces:
                self.by_piece[name]["crashed"] += 1
            found = self.failures.setdefault(("crashed", tuple(pieces), "hangs"), {
                "seed": seed, "kind": "crashed", "pieces": pieces, "path": "+".join(paths), "quantity": "", "count": 0,
                "detail": "the process died" if ended else "hangs", "program": program.source,
            })  # fmt: skip
            found["count"] += 1

    def merge(self, other: dict[str, Any]) -> None:
        """Add a report."""
        self.models += other["models"]
        self.invalid.update(other["invalid"])
        for table, counts in ((self.by_piece, other["by_piece"]), (self.by_quantity, other["by_quantity"])):
            for name, c in counts.items():
                table[name].update(c)
        for f in other["failures"]:
            key = (f["kind"], tuple(f["pieces"]), f["path"])
            if key in self.failures:
                self.failures[key]["count"] += f["count"]
            else:
                self.failures[key] = f

    def report(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "invalid": dict(self.invalid),
            "by_piece": {k: dict(c) for k, c in sorted(self.by_piece.items())},
            "by_quantity": {k: dict(c) for k, c in sorted(self.by_quantity.items())},
            "failures": list(self.failures.values()),
        }

    def show(self) -> None:
        kinds = ["right", "refused", "refused although right", "crashed", "wrong", "not applicable"]
        for title, table in (("piece", self.by_piece), ("path and quantity", self.by_quantity)):
            print(f"\n{title:32}" + "".join(f"{k:>24}" for k in kinds))
            for name, counts in sorted(table.items()):
                print(f"{name:32}" + "".join(f"{counts[k] or '':>24}" for k in kinds))
        for reason, count in self.invalid.most_common(20):
            print(f"not a program ({count}): {reason}")
        for f in self.failures.values():
            print(
                f"{f['kind']:>10} x{f['count']:<3} seed {f['seed']:<6} {f['path']:13} {f['quantity']:13} {'+'.join(f['pieces']):40} {f['detail'][:110]}"
            )
        total = Counter[str]()
        for counts in self.by_quantity.values():
            total.update(counts)
        print(f"\n{self.models} models; " + ", ".join(f"{total[k]} {k}" for k in kinds))


def paths_of(seed: int) -> list[str]:
    """The paths that a seed's program takes."""
    rng = random.Random(seed + 10**6)
    return [path for path in PATHS if rng.random() < SHARE[path]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs=2, type=int, default=[0, 50], metavar=("START", "COUNT"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--pieces", nargs="*", help="only these pieces, each alone; no name: all")
    parser.add_argument("--paths", nargs="*", choices=list(PATHS), help="only these paths")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--quiet", action="store_true", help="do not print programs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    tally, start = Tally(), time.monotonic()
    first, count = options.seeds
    names = [None] if options.pieces is None else options.pieces or [name for name, p in PIECES.items() if p.group != "frame"]
    done = 0
    for seed in range(first, first + count):
        for name in names:
            if time.monotonic() - start > options.seconds:
                break
            program = random_program(seed) if name is None else single(name, seed, time=bool(seed % 2))
            tally.add_in_child(seed, program, options.paths or paths_of(seed), not options.quiet)
            done += 1
            if options.json and done % 20 == 0:
                with open(options.json, "w") as file:
                    json.dump(tally.report(), file, indent=1)
    tally.show()
    print(f"{time.monotonic() - start:.0f} s")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(tally.report(), file, indent=1)
    return int(any(f["kind"] == "wrong" for f in tally.failures.values()))


if __name__ == "__main__":
    sys.exit(main())
