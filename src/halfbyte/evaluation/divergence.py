"""How far a checkpoint's next-token predictions are from its baseline's, on the same tokens.

With P the baseline's and Q the checkpoint's distribution at a position, t the token that follows there, in nats::

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))
    perplexity ratio = exp(mean(log P(t) - log Q(t)))
    top-1 agreement = share of positions where argmax P = argmax Q
    rms change of the target's probability = sqrt(mean((Q(t) - P(t))^2))

Standard errors treat windows, not tokens, as independent: tokens of one window share their context, and counting them
as independent would make every interval too narrow. ``se = sqrt(sum_w (sum_{i in w} (x_i - mean))^2 W / (W - 1)) / n``.

Both models are streamed block by block (each as its files say: dense, or dequantised with activations quantised as an
engine would), so neither has to fit in memory.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from halfbyte.blocks import Interner, StreamedModel, run_block
from halfbyte.calibration import TOKENS_PER_BATCH
from halfbyte.checkpoint.reader import digest_of, open_checkpoint
from halfbyte.checkpoint.source import resolve
from halfbyte.errors import CheckpointError, UsageError
from halfbyte.evaluation.windows import Window, windows_of
from halfbyte.heap import reuse_freed_memory
from halfbyte.progress import Reporter, Silent
from halfbyte.records import COMPARE_NAME, CompareRecord, WindowSums, write_json
from halfbyte.weights import Weights

LOGITS_BYTES = 128 << 20
CACHE_BYTES = 1 << 20


def compare(
    base: str | Path,
    checkpoint: str | Path,
    *,
    text: Path | None = None,
    tokens: int | None = None,
    window: int = 512,
    device: str = "auto",
    out: Path | None = None,
    reporter: Reporter | None = None,
) -> CompareRecord:
    """Measure the divergence of ``checkpoint`` from ``base``.

    Args:
        base, checkpoint: folders or hub ids, dense or compressed-tensors.
        text: UTF-8 text to predict; a short one that halfbyte ships when ``None``.
        tokens: score at most so many tokens.
        window: inputs in a window.
        device: ``auto``, ``cpu`` or ``cuda``.
        out: folder for ``compare.json``; ``None`` is the checkpoint's.
        reporter: hears progress.

    Returns:
        the record, which is also written to ``compare.json`` where the folder is writable.
    """
    reuse_freed_memory()
    reporter = reporter or Silent()
    if window < 2:
        raise UsageError(f"a window of {window} predicts nothing", where="--window", remedy="Use 512.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device", where="--device cuda", remedy="Use --device cpu.")
    target = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    folders = [resolve(base), resolve(checkpoint)]
    models = [
        StreamedModel.of(Weights.of(open_checkpoint(folder, str(name))), target)
        for folder, name in zip(folders, (base, checkpoint), strict=True)
    ]
    _require_same_vocabulary(models)
    windows = windows_of(folders[0], text, tokens, window)
    states = [
        final_states(model, windows.windows, reporter, label)
        for model, label in zip(models, ("baseline", "checkpoint"), strict=True)
    ]
    scores = score(models, states, windows.windows, reporter)
    record = CompareRecord(
        base=str(base),
        checkpoint=str(checkpoint),
        text=windows.name,
        text_sha256=windows.sha256,
        tokens=windows.tokens,
        window=window,
        metrics=scores.metrics(),
        versions={p: version(p) for p in ("halfbyte", "torch", "transformers")},
        by_window=scores.by_window(),
    )
    out = out or folders[1]
    try:
        write_json(out / COMPARE_NAME, record)
    except OSError:
        reporter.say(f"{out} cannot be written, so {COMPARE_NAME} was not left there")
    return record


def _require_same_vocabulary(models: list[StreamedModel]) -> None:
    sizes = [int(m.weights.checkpoint.text_config.get("vocab_size", 0)) for m in models]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            f"vocabularies differ: {sizes[0]} and {sizes[1]} tokens",
            where=f"{models[0].weights.checkpoint.name} and {models[1].weights.checkpoint.name}",
            remedy="Compare a checkpoint with the model it was made from.",
        )


def final_states(model: StreamedModel, windows: list[Window], reporter: Reporter, label: str) -> list[torch.Tensor]:
    """The last block's output for every window, ``[tokens, hidden]`` each, streamed block by block."""
    batches = _batches(windows)
    interner = Interner()
    hidden, arguments = [], []
    with model.embeddings(torch.unique(torch.cat([w.inputs for w in windows]))):
        for batch in batches:
            states, calls = model.embed(torch.stack([windows[i].inputs for i in batch]), interner)
            hidden.append(states)
            arguments.append(calls)
    reporter.start(f"{label}: blocks", model.num_blocks)
    for index in range(model.num_blocks):
        with model.block(index) as block:
            for b, states in enumerate(hidden):
                hidden[b] = run_block(block, states, arguments[b][index])
        reporter.advance()
    reporter.finish()
    result = [torch.empty(0)] * len(windows)
    for batch, states in zip(batches, hidden, strict=True):
        for row, i in enumerate(batch):
            result[i] = states[row]
    return result


def _batches(windows: list[Window]) -> list[list[int]]:
    """Windows of equal length together, as many as make a batch."""
    by_length: dict[int, list[int]] = {}
    for i, w in enumerate(windows):
        by_length.setdefault(len(w.inputs), []).append(i)
    batches = []
    for length, members in by_length.items():
        rows = max(1, TOKENS_PER_BATCH // length)
        batches += [members[i : i + rows] for i in range(0, len(members), rows)]
    return batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Per-token results, float64 ``[n]``: negative log-likelihoods, KL, agreement (0 or 1), change of probability.

    ``window_of`` says which window each token is from.
    """

    nll_base: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    agrees: torch.Tensor
    change: torch.Tensor
    window_of: torch.Tensor

    def metrics(self) -> dict[str, float]:
        """The divergence set; see the module's docstring for each."""
        difference, difference_se = mean_and_se(self.nll - self.nll_base, self.window_of)
        kl_mean, kl_se = mean_and_se(self.kl, self.window_of)
        top1, top1_se = mean_and_se(self.agrees, self.window_of)
        ratio = math.exp(difference)
        return {
            "perplexity_base": math.exp(float(self.nll_base.mean())),
            "perplexity": math.exp(float(self.nll.mean())),
            "perplexity_ratio": ratio,
            "perplexity_ratio_se": ratio * difference_se,
            "kl_mean": kl_mean,
            "kl_se": kl_se,
            "kl_median": float(self.kl.quantile(0.5)),
            "kl_p99": float(self.kl.quantile(0.99)),
            "kl_p999": float(self.kl.quantile(0.999)),
            "kl_max": float(self.kl.max()),
            "top1_agreement": top1,
            "top1_agreement_se": top1_se,
            "rms_probability_change": float(self.change.square().mean().sqrt()),
        }

    def by_window(self) -> list[WindowSums]:
        """Each window's sums, in the order of the windows."""
        counts = torch.bincount(self.window_of)
        columns = torch.stack([self.kl, self.nll_base, self.nll, self.agrees])
        sums = torch.zeros(4, len(counts), dtype=torch.float64).index_add_(1, self.window_of, columns)
        return [
            WindowSums(tokens=n, kl=kl, nll_base=nll_base, nll=nll, agreements=round(agrees))
            for n, (kl, nll_base, nll, agrees) in zip(counts.tolist(), sums.T.tolist(), strict=True)
        ]


def mean_and_se(values: torch.Tensor, clusters: torch.Tensor) -> tuple[float, float]:
    """Mean and its standard error with whole clusters as the independent units; tokens are, where there is one cluster.

    Args:
        values: float64 ``[n]``; clusters: int64 ``[n]``, numbered from 0.
    """
    mean = values.mean()
    count = int(clusters.max()) + 1
    if count < 2:
        clusters, count = torch.arange(len(values)), len(values)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, clusters, values - mean)
    return float(mean), float((sums.square().sum() * count / (count - 1)).sqrt() / len(values))


def score(
    models: list[StreamedModel], states: list[list[torch.Tensor]], windows: list[Window], reporter: Reporter
) -> Scores:
    """Run both heads over final states, a chunk of tokens at a time, and compare the distributions."""
    if _same_head(models):
        models = [models[0], models[0]]
    vocabulary = int(models[0].weights.checkpoint.text_config["vocab_size"])
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    parts: list[list[torch.Tensor]] = []
    reporter.start("scoring tokens", sum(len(w.targets) for w in windows))
    with models[0].head(), _head_of_other(models):
        for number, window in enumerate(windows):
            for first in range(0, len(window.targets), rows):
                targets = window.targets[first : first + rows]
                last = first + len(targets)
                p, q = (m.logits(s[number][None, first:last])[0] for m, s in zip(models, states, strict=True))
                parts.append(compare_rows(p, q, targets.to(p.device)))
                parts[-1].append(torch.full((len(targets),), number, dtype=torch.int64))
                reporter.advance(len(targets))
    reporter.finish()
    nll_base, nll, kl, agrees, change, window_of = (torch.cat(column) for column in zip(*parts, strict=True))
    return Scores(nll_base=nll_base, nll=nll, kl=kl, agrees=agrees, change=change, window_of=window_of)


def compare_rows(p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """Per-token results, float64 ``[n]`` each, of logits ``[n, vocabulary]`` float32.

    With ``Z = logsumexp``: ``KL = sum_v softmax(p)_v (p_v - q_v) - Z_p + Z_q``. A few rows at a time, so that the dozen
    passes over them stay in the cache.
    """
    rows = max(1, CACHE_BYTES // (4 * p.shape[1]))
    parts = []
    for a, b, t in zip(*(torch.split(x, rows) for x in (p, q, targets)), strict=True):
        z_a, z_b = a.logsumexp(dim=-1, keepdim=True), b.logsumexp(dim=-1, keepdim=True)
        log_pt, log_qt = (a.gather(1, t[:, None]) - z_a)[:, 0], (b.gather(1, t[:, None]) - z_b)[:, 0]
        agrees = a.argmax(dim=-1) == b.argmax(dim=-1)
        kl = torch.einsum("nv,nv->n", (a - z_a).exp_(), a - b) - (z_a - z_b)[:, 0]
        parts.append([x.double().cpu() for x in (-log_pt, -log_qt, kl, agrees, log_qt.exp() - log_pt.exp())])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _head_of_other(models: list[StreamedModel]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if models[0] is models[1] else models[1].head()


def _same_head(models: list[StreamedModel]) -> bool:
    """Whether everything after the last block is the same in both, so that one copy in memory serves."""
    first, second = ({n: digest_of(m.weights.checkpoint.read(n)) for n in m.after_blocks()} for m in models)
    return first == second
