"""A study of certificates: random architectures, clients and attacks, each answer judged against the truth.

`python -m benchmarks study --out DIR [--nets plain|norms] [--first A] [--count N] [--seconds S]` appends a line an
example to DIR/study.jsonl (nets with train-mode norms: DIR/norms.jsonl) and goes on where it was. Counted are wrong
`exact`, wrong `ambiguous`, estimates of `approximate` that are off, wrong labels that are called recovered, and the
share of solvable cases that end `failed`.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from benchmarks import asking
from benchmarks.records import Record, append, read_records
from benchmarks.study_judge import entries, judge, solvable
from benchmarks.study_nets import Net, architecture
from benchmarks.study_norms import run_net
from leakjax import InputError, Observation, invert, observe

ROOT = Path(__file__).resolve().parents[1]
"""Left out of what records say: a place on one machine."""

ARCHITECTURES = 90
"""Ten activations in nine forms."""

STEP = 17
"""Has no factor in common with the number of architectures: multiples of it visit each one once."""


class Client(NamedTuple):
    """What a client does: `examples` behind a gradient, how its weights in it are, precision, a factor, noise."""

    name: str
    examples: int = 1
    weights: tuple[float, ...] = ()
    dtype: str = "float64"
    stored: Any = None
    factor: float = 1.0
    noise: float = 0.0
    told: bool = False


CLIENTS = (
    Client("plain"),
    Client("float32", dtype="float32"),
    Client("bfloat16", stored=ml_dtypes.bfloat16),
    Client("scaled", factor=-0.1),
    Client("noisy", noise=1e-4),
    Client("noisy_told", noise=1e-3, told=True),
    Client("batch", examples=2),
    Client("summed", examples=2, weights=(2.0, 2.0)),
    Client("weighted", examples=2, weights=(1.6, 0.4)),
)
ATTACKS = {"plain": ("copa", "match", "rgap"), "scaled": ("copa", "match")}
BATCHES_OF = 7  # every seventh architecture has clients with batches: each size compiles its own programs


def cases(net: Net) -> Iterator[tuple[Client, str]]:
    """The clients and attacks of one architecture."""
    for client in CLIENTS:
        if client.examples > 1 and net.number % BATCHES_OF:
            continue
        for attack in ATTACKS.get(client.name, ("copa",)):
            yield client, attack


def run_architecture(number: int, done: set[tuple[int, str, str]], victims: int = 4) -> Iterator[Record]:
    """A record an example of every case of an architecture that is not `done`."""
    net = architecture(number)
    for client, attack in cases(net):
        if (number, client.name, attack) in done:
            continue
        seed = CLIENTS.index(client)
        params, count = net.params(seed % 2), victims * client.examples if client.examples == 1 else client.examples
        images, labels = net.images(seed, count), net.label_draws(seed, count)
        base = {"net": number, "activation": net.activation, "form": net.form, "client": client.name, "attack": attack}
        begun = time.process_time()
        try:
            observation = send(net, params, client, images, labels, seed)
            noise = {"gradient_noise": client.noise} if client.told else {}
            answer = invert(observation, attack=attack, **noise)
        except InputError as error:
            yield base | {
                "status": "refused",
                "reason": str(error).replace(f"{ROOT}/", ""),
                "cpu_s": time.process_time() - begun,
            }
            continue
        spent = time.process_time() - begun
        verdicts = judge(observation, answer, images, labels)
        for k, verdict in enumerate(verdicts):
            found = entries(verdict, answer.certificates[k], answer.label_sources[k])
            able = solvable(net.apply, params, net.loss, images[k], int(labels[k]))
            yield base | found | {"solvable": able, "cpu_s": round(spent / len(verdicts), 2)}


def send(
    net: Net, params: Mapping[str, Any], client: Client, images: np.ndarray, labels: np.ndarray, seed: int
) -> Observation:
    """What the client sends: its gradients with everything that was done to them."""
    plain = observe(
        (net.apply, params), (images, labels), loss=net.loss, input_range=net.input_range, dtype=client.dtype
    )
    weights = np.asarray(client.weights or (1.0,) * client.examples) / client.examples
    rng = np.random.default_rng((net.number, seed, 3))

    def sent(g: np.ndarray) -> np.ndarray:
        grouped = g.reshape(-1, client.examples, *g.shape[1:])
        out = client.factor * np.tensordot(weights.astype(g.dtype), grouped, axes=([0], [1]))
        out = out + client.noise * rng.normal(size=out.shape)
        return out.astype(client.stored).astype(float) if client.stored else out.astype(g.dtype)

    gradients = {p: sent(np.asarray(g)) for p, g in plain.gradients.items()}
    return dataclasses.replace(plain, gradients=gradients, examples=client.examples)


class Kind(NamedTuple):
    """A kind of nets: the file of its records, `number_of(turn)`, and `records_of(number, done)`."""

    file: str
    number_of: Callable[[int], int]
    records_of: Callable[[int, set[tuple[int, str, str]]], Iterator[Record]]


KINDS: Mapping[str, Kind] = {
    "plain": Kind(
        "study.jsonl", lambda turn: STEP * turn % ARCHITECTURES, lambda number, done: run_architecture(number, done)
    ),
    "norms": Kind("norms.jsonl", lambda turn: turn, lambda number, done: run_net(number, done)),
}


def run(out: Path, kind: Kind, first: int, count: int, seconds: float) -> None:
    """Nets by turn, from the `first` in their order on, whole ones, until `seconds` are over.

    The order of plain ones jumps (`STEP`), so that any part of it has all activations and forms.
    """
    path, end = out / kind.file, time.monotonic() + seconds
    done = {(r["net"], r["client"], r["attack"]) for r in read_records(path)}
    for turn in range(first, first + count):
        if time.monotonic() > end:
            break
        records: list[Record] = []
        for record in kind.records_of(kind.number_of(turn), done):
            if records and (records[0]["client"], records[0]["attack"]) != (record["client"], record["attack"]):
                append(path, records)  # all examples of a case, or none
                records = []
            records.append(record)
        append(path, records)
        jax.clear_caches()


def summary(records: list[Record]) -> str:
    """A Markdown table: by client and by form, cases, statuses, what is wrong, and solvable cases that `failed`."""
    rows = ["| kind | cases | exact | ambiguous | approximate | failed | refused | wrong | solvable, `failed` |"]
    rows.append("|---|---|---|---|---|---|---|---|---|")
    kinds: list[tuple[str, list[Record]]] = [("all", records)]
    for key in ("client", "attack", "form", "activation"):
        grouped: dict[str, list[Record]] = collections.defaultdict(list)
        for record in records:
            grouped[record[key]].append(record)
        kinds += [(f"{key}: {name}", mine) for name, mine in grouped.items()]
    for name, mine in kinds:
        statuses = collections.Counter(r["status"] for r in mine)
        wrong = collections.Counter(r["wrong"] for r in mine if r.get("wrong"))
        able = [r for r in mine if r.get("solvable") and r["status"] != "refused"]
        failed = sum(r["status"] == "failed" for r in able)
        cells = [str(statuses[s]) for s in ("exact", "ambiguous", "approximate", "failed", "refused")]
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(wrong.items())) or "0"
        share = f"{failed} of {len(able)} ({100 * failed / len(able):.0f} %)" if able else "-"
        rows.append(f"| {name} | {len(mine)} | {' | '.join(cells)} | {words} | {share} |")
    return "\n".join(rows) + "\n"


def main(words: Sequence[str]) -> None:
    """Run a slice and print the table of all records, or print that of a file."""
    parser = asking.Parser(prog="python -m benchmarks study", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench-out/study"), metavar="DIR")
    parser.add_argument("--table", type=Path, metavar="RECORDS", help="print the table of records, run nothing")
    parser.add_argument("--nets", choices=list(KINDS), default="plain", help="norms: with norms in training mode")
    parser.add_argument("--first", type=int, default=0, metavar="A", help="turn of the first architecture")
    parser.add_argument("--count", type=int, default=ARCHITECTURES, metavar="N", help="how many architectures")
    parser.add_argument("--seconds", type=float, default=900.0, metavar="S", help="begin none after so long")
    given = parser.parse_args(words)
    if given.first < 0 or given.count < 1 or not given.seconds > 0:
        raise InputError("--first must be 0 or more, --count 1 or more, --seconds above 0")
    if given.table is None:
        asking.folder(given.out)
        run(given.out, KINDS[given.nets], given.first, given.count, given.seconds)
    place = given.table or given.out / KINDS[given.nets].file
    if given.table is not None or place.exists():  # no time was left for the first record
        print(asking.printed(place, summary), end="")
