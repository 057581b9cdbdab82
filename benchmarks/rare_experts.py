"""Which Hessian serves an expert best that few calibration tokens reach: its own, its layer's, or a mixture?

    python benchmarks/rare_experts.py --model DIR --text FILE --held-out FILE [--blocks 2,9,16] [--tokens 16384]

There is no mixture of experts small enough for this, so MLPs of a dense model are cut into experts, as MoEfication
does (arXiv 2110.01786): hidden units whose gates point the same way make an expert. Two routers send the MLP's real
inputs to them: ``activity`` to the two experts whose units answer most, ``topics`` to one, by the nearest of as many
centres of the inputs. Each expert's Linears are then quantised (4 bits, groups of 64) with Hessians of its first 16,
64, ... tokens and mixtures of them with others, and judged by the output error ``tr(E H' E^T) / tr(W H' W^T)`` on all
tokens of other text that reach the expert.

With n tokens of its own, ``H_n`` their moment, and ``C`` the mean moment of all tokens that enter the layer (for down:
of what this expert's own units make of all of them), the Hessians are, for inputs of some width::

    own                  H_n
    layer                C
    mixed a              H_n + a width C
    sampled a            the same with C of as many tokens, taken at random
    index by index       down only: the mean moment over all experts, each with its own units and tokens
    ..., diagonal d      H + d width diag(H) / tokens instead of H, tokens being those that H stands for
    ..., diagonal root   the same with the root of width / tokens as the share
    own, damped f        H_n with f of its mean diagonal added, instead of 0.01

Printed are geometric means over experts of the error relative to that with all of the expert's tokens; with them in
results/DATE-rare-experts-MODEL.json goes the standard error of their logarithm, in which blocks are the units.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.methods.gptq import factor_hessians, quantize_gptq_batch
from halfbyte.schemes import WeightFormat

FORMAT = WeightFormat(num_bits=4, group_size=64)
EXPERTS = 8
EVERY = 1 << 30
OWN_TOKENS = (0, 16, 64, 256, 1024, EVERY)
SHARES = (0.25, 1, 4)
DAMPED = (0.1, 1.0)
WINDOW = 512


def inputs_of(model: Any, tokenizer: Any, text: Path, tokens: int, blocks: list[int]) -> list[torch.Tensor]:
    """What enters the MLPs of some blocks, ``[tokens, width]`` float32 each."""
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt", truncation=True, max_length=tokens).input_ids
    seen: dict[int, list[torch.Tensor]] = defaultdict(list)
    layers = model.model.layers
    hooks = [
        layers[b].mlp.register_forward_pre_hook(lambda module, args, b=b: seen[b].append(args[0][0].float()))
        for b in blocks
    ]
    for window in torch.split(ids[0, : ids.shape[1] // WINDOW * WINDOW], WINDOW):
        model.model(window.unsqueeze(0), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen[b]) for b in blocks]


def units_of_experts(gate: torch.Tensor) -> list[torch.Tensor]:
    """The hidden units in groups of one size: k-means over the gates' directions, centres filled up in turn."""
    rows = torch.nn.functional.normalize(gate, dim=1)
    centres, size = rows[:: len(rows) // EXPERTS][:EXPERTS], len(rows) // EXPERTS
    for _ in range(10):
        likeness, room = rows @ centres.T, [size] * EXPERTS
        owner = torch.full((len(rows),), -1)
        for place in likeness.flatten().argsort(descending=True).tolist():
            unit, expert = divmod(place, EXPERTS)
            if owner[unit] < 0 and room[expert]:
                owner[unit], room[expert] = expert, room[expert] - 1
        groups = [torch.where(owner == e)[0] for e in range(EXPERTS)]
        centres = torch.stack([torch.nn.functional.normalize(rows[g].mean(0), dim=0) for g in groups])
    return groups


def centres_of(x: torch.Tensor) -> torch.Tensor:
    """k-means of the directions of what enters, ten rounds."""
    rows = torch.nn.functional.normalize(x, dim=1)
    centres = rows[:: len(rows) // EXPERTS][:EXPERTS]
    for _ in range(10):
        nearest = (rows @ centres.T).argmax(1)
        means = [rows[nearest == e].mean(0) if (nearest == e).any() else centres[e] for e in range(EXPERTS)]
        centres = torch.nn.functional.normalize(torch.stack(means), dim=1)
    return centres


def moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


@dataclass(frozen=True, slots=True)
class Tried:
    """A way to make Hessians: for each expert one."""

    name: str
    hessians: list[torch.Tensor]
    damp_fraction: float = 0.01


def candidates(
    n: int, own: list[torch.Tensor], layer: list[torch.Tensor], sampled: list[torch.Tensor]
) -> Iterator[Tried]:
    """What is tried where there are own tokens; ``layer`` is C, ``sampled`` a moment of a few tokens."""
    width = own[0].shape[0]
    yield Tried("own", own)
    yield from (Tried(f"own, damped {f}", own, f) for f in DAMPED)
    yield from (Tried(f"own, diagonal {d}", [diagonally(h, d * width / n) for h in own]) for d in SHARES)
    yield Tried("own, diagonal root", [diagonally(h, math.sqrt(width / n)) for h in own])
    for a in SHARES:
        mixed = [h + a * width * c for h, c in zip(own, layer, strict=True)]
        yield Tried(f"mixed {a}", mixed)
        share = width / (n + a * width)
        yield Tried(f"mixed {a}, diagonal 1", [diagonally(h, share) for h in mixed])
        yield Tried(f"mixed {a}, diagonal root", [diagonally(h, math.sqrt(share)) for h in mixed])
    more = [diagonally(h + c, width / (n + width)) for h, c in zip(own, sampled, strict=True)]
    yield Tried("sampled 1, diagonal 1", more)


def diagonally(h: torch.Tensor, share: float) -> torch.Tensor:
    """``H + share diag(H)``."""
    return h + share * h.diagonal().diag()


def errors(weights: torch.Tensor, tried: Tried, judges: list[torch.Tensor]) -> list[float]:
    """Held-out errors of one Linear of every expert."""
    h = torch.stack(tried.hessians)
    factors = factor_hessians(h, tried.damp_fraction, where=[str(e) for e in range(len(h))])
    found = []
    for weight, (result,), judge in zip(
        weights, quantize_gptq_batch(weights, h, factors, FORMAT, torch.bfloat16), judges, strict=True
    ):
        e = result.dense() - weight
        found.append(float(((e @ judge) * e).sum()) / float(((weight @ judge) * weight).sum()))
    return found


def of_block(mlp: Any, x: torch.Tensor, unseen: torch.Tensor) -> list[dict[str, Any]]:
    """Relative errors of one block's experts."""
    gate, up, down = (m.weight.detach().float() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    units = units_of_experts(gate)

    def hidden(tokens: torch.Tensor, e: int) -> torch.Tensor:
        answer: torch.Tensor = mlp.act_fn(tokens @ gate[units[e]].T) * (tokens @ up[units[e]].T)
        return answer

    def by_activity(tokens: torch.Tensor) -> torch.Tensor:
        strength = torch.stack([hidden(tokens, e).abs().sum(1) for e in range(EXPERTS)], dim=1)
        return torch.zeros_like(strength, dtype=torch.bool).scatter_(1, strength.topk(2, dim=1).indices, True)

    centres = centres_of(x)

    def by_topic(tokens: torch.Tensor) -> torch.Tensor:
        likeness = torch.nn.functional.normalize(tokens, dim=1) @ centres.T
        return torch.nn.functional.one_hot(likeness.argmax(1), EXPERTS).bool()

    routers: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"activity": by_activity, "topics": by_topic}
    rows = []
    for router, route in routers.items():
        seen_by, judged_by = route(x), route(unseen)
        generator = torch.Generator().manual_seed(0)
        mine = [x[seen_by[:, e]] for e in range(EXPERTS)]
        mine = [t[torch.randperm(len(t), generator=generator)] for t in mine]
        used = [e for e in range(EXPERTS) if len(mine[e]) >= OWN_TOKENS[-2] and judged_by[:, e].sum() >= WINDOW]
        into = {
            "gate, up": lambda tokens, e: tokens,
            "down": hidden,
        }
        for linear, enters in into.items():
            weights = torch.stack(
                [torch.cat([gate[units[e]], up[units[e]]]) if linear == "gate, up" else down[:, units[e]] for e in used]
            )
            judges = [moment(enters(unseen[judged_by[:, e]], e)) for e in used]
            layer = [moment(enters(x, e)) / len(x) for e in used]
            width = len(layer[0])
            sampled = []
            for e in used:
                some = torch.randperm(len(x), generator=generator)[:width]
                sampled.append(moment(enters(x[some], e)))
            everybody = sum(moment(enters(mine[e], e)) for e in range(EXPERTS)) / sum(map(len, mine))
            best = errors(weights, Tried("own", [moment(enters(mine[e], e)) for e in used]), judges)
            for n in OWN_TOKENS:
                own = [moment(enters(mine[e][:n], e)) for e in used]
                if n:
                    tokens = min(n, *(len(mine[e]) for e in used))
                    tried = list(candidates(tokens, own, layer, sampled))
                else:
                    loaded = [diagonally(c, width / len(x)) for c in layer]
                    tried = [Tried("layer", layer), Tried("layer, diagonal 1", loaded)]
                if n == 0 and linear == "down":
                    tried.append(Tried("index by index", [everybody] * len(used)))
                for way in tried:
                    for e, value, least in zip(used, errors(weights, way, judges), best, strict=True):
                        rows.append(
                            {"router": router, "linear": linear, "expert": e, "tokens": n, "hessian": way.name}
                            | {"relative_error": value, "of_all_tokens": value / least, "all_tokens": len(mine[e])}
                        )
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over blocks' experts."""
    groups: dict[tuple[str, str, int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        key = r["router"], r["linear"], r["tokens"], r["hessian"]
        groups[key][r["block"]].append(math.log(r["of_all_tokens"]))
    found = []
    for (router, linear, tokens, hessian), by_block in groups.items():
        means = [statistics.fmean(v) for v in by_block.values()]
        error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None
        found.append(
            {"router": router, "linear": linear, "tokens": tokens, "hessian": hessian}
            | {"of_all_tokens": math.exp(statistics.fmean(means)), "log_standard_error": error}
            | {
                "experts": sum(map(len, by_block.values())),
                "by_block": {b: round(math.exp(m), 4) for b, m in zip(by_block, means, strict=True)},
            }
        )
    return found


def show(found: list[dict[str, Any]]) -> None:
    for router, linear in dict.fromkeys((f["router"], f["linear"]) for f in found):
        some = [f for f in found if (f["router"], f["linear"]) == (router, linear)]
        names = list(dict.fromkeys(f["hessian"] for f in some))
        value = {(f["hessian"], f["tokens"]): f"{f['of_all_tokens']:.3f}" for f in some}
        rows = [[f"{router}: {linear}", *("all tokens" if n == EVERY else f"{n} tokens" for n in OWN_TOKENS)]]
        rows += [[name, *(value.get((name, n), "") for n in OWN_TOKENS)] for name in names]
        print(harness.table(rows), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="calibration text")
    parser.add_argument("--held-out", type=Path, required=True, help="text that errors are judged by")
    parser.add_argument("--blocks", default="2,9,16")
    parser.add_argument("--tokens", type=int, default=16384, help="of each text")
    parser.add_argument("--out", type=Path, default=harness.RESULTS)
    options = parser.parse_args()
    blocks = [int(b) for b in options.blocks.split(",")]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model.model.layers = model.model.layers[: max(blocks) + 1]
        seen, unseen = (
            inputs_of(model, tokenizer, t, options.tokens, blocks) for t in (options.text, options.held_out)
        )
        rows = []
        for b, x, y in zip(blocks, seen, unseen, strict=True):
            print(f"block {b}: {len(x)} and {len(y)} tokens", file=sys.stderr)
            rows += [{"block": b} | r for r in of_block(model.model.layers[b].mlp, x, y)]
    found = summary(rows)
    show(found)
    result = {
        "date": harness.today(),
        "model": options.model.name,
        "experts": EXPERTS,
        "format": {"num_bits": FORMAT.num_bits, "group_size": FORMAT.group_size},
        "tokens": {"calibration": len(seen[0]), "held_out": len(unseen[0])},
        "summary": found,
        "versions": harness.versions(sys.executable, ("halfbyte", "torch", "transformers", "numba")),
        "machine": harness.machine(),
        **harness.git_commit(),
    }
    harness.write_result(options.out / f"{harness.today()}-rare-experts-{options.model.name}.json", result)


if __name__ == "__main__":
    main()
