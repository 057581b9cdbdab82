"""What each part of halfbyte is worth for the whole model: one thing left out or changed at a time, all scored alike.

    python benchmarks/parts.py --model DIR --calibration-text FILE --validation-text FILE [--scheme W4A16|W8A8]
    python benchmarks/parts.py --show benchmarks/results/FILE.json

Every variant is a recipe (and, for the dtype, an option), run once by ``halfbyte quantize`` in a child process
(``harness.measure``) and scored by ``halfbyte compare`` on the validation text. All are scored on the same windows of
tokens, so each one's difference from the default has a paired standard error, which is much smaller than either's own.

The result is written after each variant. A call that finds its result file goes on with the variants that are missing;
it stops where the file is about other code, texts, settings, versions or another machine. ``--again`` measures anew.

What each part does to single Linears, on held-out text, is in ``ablation.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import harness
import peers

DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to run ``halfbyte quantize``.

    Attributes:
        what: for tables.
        keys: of the recipe, beside scheme and group size.
        steps: of the recipe's ``[gptq]``.
        words: added to the command line, for what no recipe says.
    """

    what: str
    keys: Mapping[str, str | int | float] = field(default_factory=dict)
    steps: Mapping[str, bool | float] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def recipe(self, scheme: str, group_size: int | None) -> str:
        """The recipe as TOML (whose strings, numbers and booleans are written as JSON's)."""
        keys: dict[str, Any] = {"scheme": scheme, **({"group_size": group_size} if group_size else {}), **self.keys}
        steps = ["[gptq]", *assignments(self.steps)] if self.steps else []
        return "\n".join([*assignments(keys), *steps]) + "\n"


def assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


RTN = Variant(what="round to nearest", keys={"method": "rtn"})
AS_IT_IS = Variant(what="the default")
HIGH = Variant(what="blocks tuned longer, then all scales together", keys={"effort": "high"})
HIGH_BY_BLOCK = Variant(what="blocks tuned longer", keys={"effort": "high"}, steps={"end_to_end": False})
UNSEQUENTIAL = Variant(what="each block observed before it is quantised", steps={"true_sequential": False})
UNSHRUNK = Variant(what="correlations of inputs taken as counted", steps={"shrinkage": 0.0})
VARIANTS: dict[str, dict[str, Variant]] = {
    "W4A16": {
        "rtn": RTN,
        DEFAULT: AS_IT_IS,
        "effort=low": Variant(what="blocks not tuned", keys={"effort": "low"}),
        "effort=high": HIGH,
        "effort=high, end_to_end=off": HIGH_BY_BLOCK,
        "static_order=off": Variant(what="columns in file order", steps={"static_order": False}),
        "scale_search=off": Variant(what="scales from the range", steps={"scale_search": False}),
        "scale_refit=off": Variant(what="scales not refitted", steps={"scale_refit": False}),
        "code_descent=off": Variant(what="no coordinate descent on codes", steps={"code_descent": False}),
        "shrinkage=off": UNSHRUNK,
        "true_sequential=off": UNSEQUENTIAL,
        "tune_codes=on": Variant(what="blocks' codes tuned with their scales", steps={"tune_codes": True}),
        "tune_norms=on": Variant(what="blocks' norms tuned with their scales", steps={"tune_norms": True}),
        "dtype=float32": Variant(what="blocks compute in float32", words=("--dtype", "float32")),
        "group_size=32": Variant(what="groups of 32", keys={"group_size": 32}),
        "target_bits=4.5": Variant(what="W8A16 where 4 bits hurt most, up to 4.5 bits", keys={"target_bits": 4.5}),
    },
    "W8A8": {
        "rtn": RTN,
        DEFAULT: AS_IT_IS,
        "smoothing=off": Variant(what="outliers stay in the inputs", steps={"smoothing": False}),
        "shrinkage=off": UNSHRUNK,
        "true_sequential=off": replace(UNSEQUENTIAL, what=f"{UNSEQUENTIAL.what}, and nothing smoothed"),
        "effort=high": HIGH,
        "effort=high, end_to_end=off": HIGH_BY_BLOCK,
    },
}

# Take 4.5 bits, where groups of 128 take 4.125; groups of 32 take these bits themselves.
IN_LARGER_GROUPS = ("group_size=32", "target_bits=4.5")


def main() -> None:
    options = arguments()
    if options.show:
        print(render(json.loads(options.show.read_text(encoding="utf-8"))))
        return
    result = begun(options)
    for name in options.only:
        if name in result["variants"] and not options.again:
            print(f"{name} is in {options.result} already", file=sys.stderr)
            continue
        print(f"{name}: {VARIANTS[options.scheme][name].what}", file=sys.stderr, flush=True)
        result["variants"][name] = measured(options, result["work"], VARIANTS[options.scheme][name])
        result["differences"] = differences(result["variants"])
        harness.write_result(options.result, result)
    print(render(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration-text", type=Path)
    parser.add_argument("--validation-text", type=Path)
    parser.add_argument("--scheme", choices=list(VARIANTS), default="W4A16")
    parser.add_argument("--group-size", type=int, help="of W4A16 (default: the largest of 128, 64, 32 that divides)")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--score-tokens", type=int, default=0, help="score the first N validation tokens (0: all)")
    parser.add_argument(
        "--threads", type=int, help="OMP_NUM_THREADS, e.g. 1 on a busy machine (default: halfbyte's choice)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants (default: all of the scheme)")
    parser.add_argument("--again", action="store_true", help="measure variants anew that the result has already")
    parser.add_argument("--result", type=Path, help="result file (default: results/DATE-parts-MODEL-SCHEME.json)")
    parser.add_argument("--show", type=Path, metavar="RESULT", help="print a result file, and stop")
    options = parser.parse_args()
    if options.show:
        return options
    missing = [
        f"--{n.replace('_', '-')}" for n in ("model", "calibration_text", "validation_text") if not options.__dict__[n]
    ]
    if missing:
        parser.error(f"{' and '.join(missing)} must be given (or --show RESULT)")
    if options.scheme != "W4A16" and options.group_size:
        parser.error(f"{options.scheme} has no groups: leave --group-size out")
    known = VARIANTS[options.scheme]
    unknown = [name for name in options.only or [] if name not in known]
    if unknown:
        parser.error(f"{options.scheme} has no variant {', '.join(unknown)}; there are {', '.join(known)}")
    absent = [str(p) for p in (options.calibration_text, options.validation_text) if not p.is_file()]
    absent += [] if (options.model / "config.json").is_file() else [str(options.model / "config.json")]
    if absent:
        parser.error(f"no such file: {', '.join(absent)}")
    if options.scheme == "W4A16":
        config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        options.group_size = options.group_size or peers.default_group_size(config)
    pointless = IN_LARGER_GROUPS if options.group_size == 32 else ()
    asked = [name for name in pointless if name in (options.only or [])]
    if asked:
        parser.error(f"the default has groups of 32, beside which {' and '.join(asked)} cannot be measured")
    options.only = [name for name in known if name in (options.only or known) and name not in pointless]
    file = f"{harness.today()}-parts-{options.model.name}-{options.scheme}.json"
    options.result = options.result or harness.RESULTS / file
    return options


def begun(options: argparse.Namespace) -> dict[str, Any]:
    """The result file where there is one that this call can go on with, or a new result without variants."""
    asked: dict[str, Any] = {
        "work": {
            "model": options.model.name,
            "model_sha256": peers.file_digest(sorted(options.model.glob("*.safetensors"))),
            "halfbyte_sha256": peers.file_digest(sorted(halfbyte_folder().rglob("*.py"))),
            "scheme": options.scheme,
            "group_size": options.group_size,
            "calibration_text": options.calibration_text.name,
            "calibration_text_sha256": peers.file_digest([options.calibration_text]),
            "validation_text": options.validation_text.name,
            "validation_text_sha256": peers.file_digest([options.validation_text]),
            "samples": options.samples,
            "seq_len": options.seq_len,
            "score_tokens": options.score_tokens,
            "threads": options.threads,
        },
        "machine": harness.machine(),
        "versions": harness.versions(sys.executable, peers.OUR_PACKAGES),
    }
    if options.result.exists():
        found: dict[str, Any] = json.loads(options.result.read_text(encoding="utf-8"))
        pairs = [(part, key) for part in asked for key in asked[part]]
        other = [f"{part}: {key}" for part, key in pairs if asked[part][key] != found.get(part, {}).get(key)]
        if other:
            raise SystemExit(
                f"{options.result} was measured otherwise ({', '.join(other)}) than would be now, and one table cannot "
                "hold both. Name another file with --result, or remove this one."
            )
        return found
    head = {"benchmark": "parts", "date": harness.today(), "commit": harness.git_commit()}
    return {**head, **asked, "variants": {}, "differences": {}}


def halfbyte_folder() -> Path:
    """Where the children will import halfbyte from; this process, which stays small, does not."""
    spec = find_spec("halfbyte")
    if spec is None or spec.origin is None:
        raise SystemExit(f"{sys.executable} finds no halfbyte: install it first (pip install .)")
    return Path(spec.origin).parent


def measured(options: argparse.Namespace, work: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    """Quantise and score once; the checkpoint is not kept."""
    recipe = variant.recipe(work["scheme"], work["group_size"])
    env = {"HF_HUB_OFFLINE": "1", **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})}
    with tempfile.TemporaryDirectory(prefix="halfbyte-bench-") as scratch:
        folder = Path(scratch)
        out, file, log = folder / "checkpoint", folder / "recipe.toml", folder / "log"
        file.write_text(recipe, encoding="utf-8")
        command = [sys.executable, "-m", "halfbyte", "quantize", options.model, out, "--json", "--recipe", file]
        if variant.keys.get("method") != "rtn":
            command += ["--calibration", f"text:{options.calibration_text}"]
            command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
        figures = harness.plain(harness.measure([*command, *variant.words], log, env))
        manifest = json.loads((out / "halfbyte.json").read_text(encoding="utf-8"))
        return {
            "what": variant.what,
            "recipe": recipe,
            "words": list(variant.words),
            **figures,
            "planned_peak_bytes": manifest["run"].get("planned_peak_bytes"),  # of runs on a CPU
            "checkpoint_sha256": peers.file_digest(sorted(out.glob("*.safetensors"))),
            "bits_per_weight": manifest["bits_per_weight"],
            "calibration_sha256": manifest["calibration"] and manifest["calibration"]["sha256"],
            "inside": manifest["run"],
            "score": harness.compared(options.model, out, options.validation_text, options.score_tokens, log, env),
        }


def differences(variants: Mapping[str, Any]) -> dict[str, Any]:
    """Each variant less the default, where that is there: KL and negative log-likelihood a token, top-1 agreement."""
    if DEFAULT not in variants:
        return {}
    usual = variants[DEFAULT]["score"]["by_window"]
    found: dict[str, Any] = {}
    for name, variant in variants.items():
        windows = variant["score"]["by_window"]
        if name == DEFAULT:
            continue
        found[name] = {}
        for metric, key in (("kl", "kl"), ("nll", "nll"), ("top1", "agreements")):
            mean, se = paired(windows, usual, key)
            found[name] |= {metric: mean, f"{metric}_se": se}
    return found


def paired(
    ours: Sequence[Mapping[str, float]], usual: Sequence[Mapping[str, float]], key: str
) -> tuple[float, float | None]:
    """Mean difference a token and its standard error, from the sums of the same windows.

    With ``d_w`` the difference of window w's sums, ``t_w`` its tokens, ``n`` all of them and ``m = sum(d_w) / n``, the
    error is ``sqrt(sum_w (d_w - t_w m)^2 W / (W - 1)) / n``: the one that ``halfbyte compare`` gives for means over
    tokens, of the tokens' differences. ``None`` where there is one window only.
    """
    tokens = [w["tokens"] for w in ours]
    if tokens != [w["tokens"] for w in usual]:
        raise SystemExit("two scores are of different windows, so their differences cannot be paired")
    apart = [a[key] - b[key] for a, b in zip(ours, usual, strict=True)]
    total, count = sum(tokens), len(tokens)
    mean = sum(apart) / total
    if count == 1:
        return mean, None
    squares = sum((d - t * mean) ** 2 for d, t in zip(apart, tokens, strict=True))
    return mean, math.sqrt(squares * count / (count - 1)) / total


def render(result: dict[str, Any]) -> str:
    """The result as a Markdown table with a line about where it was measured. Uses nothing but the result."""
    order = [name for name in VARIANTS[result["work"]["scheme"]] if name in result["variants"]]
    variants = {name: result["variants"][name] for name in order}
    head = ("variant", "KL (nats)", "KL less the default's", "perplexity ratio", "top-1 agreement")
    rows = [[*head, "wall time (s)", "CPU time (s)", "peak memory (GiB)", "other work"]]
    for name, v in variants.items():
        m = v["score"]["metrics"]
        scored = [
            peers.plus_minus(m, "kl_mean", "kl_se"),
            difference(result["differences"].get(name)),
            peers.plus_minus(m, "perplexity_ratio", "perplexity_ratio_se"),
            peers.plus_minus(m, "top1_agreement", "top1_agreement_se"),
        ]
        others = "" if v["other_cpu_share"] is None else f"{v['other_cpu_share']:.0%}"
        cost = [f"{v['wall_s']:.0f}", f"{v['cpu_s']:.0f}", f"{v['peak_rss_bytes'] / 2**30:.2f}", others]
        rows.append([f"{name}: {v['what']}", *scored, *cost])
    windows = {len(v["score"]["by_window"]) for v in variants.values()}
    said = peers.scored_on({n: {"halfbyte_compare": v["score"]} for n, v in variants.items()})
    said += f" in {' or '.join(map(str, sorted(windows)))} windows" if windows else ""
    threads = result["work"]["threads"]
    said += f", {threads} thread{'s' * (threads > 1)}" if threads else ""
    return f"{harness.table(rows)}\n\n{peers.where(result, said, list(variants.values()))}"


def difference(found: Mapping[str, float | None] | None) -> str:
    """The difference in KL with its sign and paired standard error; nothing for the default itself."""
    if not found:
        return ""
    if found["kl_se"] is None:
        return f"{found['kl']:+.4f}"
    return peers.plus_minus(found, "kl", "kl_se", sign="+")


if __name__ == "__main__":
    main()
