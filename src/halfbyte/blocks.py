"""Run a model whose decoder blocks are in memory one at a time.

The module tree is built by transformers with parameters on the meta device, so it costs no memory. Embeddings and final
norm are loaded for the stages that need them; a block's weights are loaded, used and freed.

What each block is called with is learnt without tracing: for one cheap pass a batch, every block's ``forward`` is
replaced by a recorder that keeps the keyword arguments (masks, position embeddings; they differ between Gemma 3's
sliding and full layers) and returns its input. Equal tensors among them are kept once.

Batches are right-padded: a causal model's real positions cannot see the padding behind them, so no mask is needed, and
attention takes its fast path. Statistics leave padded positions out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.architectures import NOT_LANGUAGE, find_block_prefix
from halfbyte.attention import NAME as PRODUCTS
from halfbyte.attention import use_products
from halfbyte.checkpoint.reader import Checkpoint, bytes_of
from halfbyte.errors import ArchitectureError, CheckpointError, NumericsError
from halfbyte.gpu import works_ahead
from halfbyte.heap import mapped
from halfbyte.read_ahead import ReadAhead
from halfbyte.weights import Weights

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(slots=True)
class StreamedModel:
    """A causal language model, streamed.

    Attributes:
        weights: where parameters come from.
        model: the whole module tree; parameters are on the meta device unless loaded.
        decoder: the module that holds the block list, the language model without its head.
        layers: the block list.
        disk_prefix: path of the block list in the checkpoint's names.
        device: where blocks run; dtype: what they compute in.
        ahead: fetches a block's weights while the one before is worked on; ``None`` on a CPU.
    """

    weights: Weights
    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    disk_prefix: str
    device: torch.device
    dtype: torch.dtype
    ahead: ReadAhead | None = None
    _vocabulary: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))

    @staticmethod
    def of(weights: Weights, device: torch.device, dtype: torch.dtype | None = None) -> StreamedModel:
        """Build the module tree of a checkpoint.

        Args:
            weights: its parameters.
            device: where blocks run.
            dtype: what they compute in; ``None`` is the checkpoint's on a GPU and float32 on a CPU.
        """
        checkpoint = weights.checkpoint
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
        model = build_on_meta(checkpoint, dtype)
        if device.type == "cpu" and dtype == torch.bfloat16:
            use_products(model)
        expected = checkpoint.text_config.get("num_hidden_layers")
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == expected and not NOT_LANGUAGE.search(name)
        ]
        disk_prefix = find_block_prefix(weights.names())
        if not found or disk_prefix is None:
            raise ArchitectureError(
                f"no list of {expected} decoder blocks was found in {type(model).__name__}",
                where=checkpoint.name,
                remedy="halfbyte quantises decoder-only language models.",
            )
        path, layers = found[0]
        decoder = model.get_submodule(path.rpartition(".")[0])
        ahead = ReadAhead.onto(weights.dense, device, dtype) if works_ahead(device) else None
        return StreamedModel(weights, model, decoder, layers, disk_prefix, device, dtype, ahead)

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    def disk_name(self, index: int, name: str) -> str:
        """A block's parameter or module name, as the checkpoint spells it."""
        return f"{self.disk_prefix}.{index}.{name}"

    @contextlib.contextmanager
    def embeddings(self, vocabulary: torch.Tensor) -> Iterator[None]:
        """Load what :meth:`embed` needs: final norm and such, and of the embedding table only the rows in use.

        A table of 262,144 x 5,376 takes 5.6 GB in float32; the tokens of a calibration set use a few per cent of it.

        Args:
            vocabulary: ``[n]`` int64, sorted unique token ids that will be embedded.
        """
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        if vocabulary.numel() and int(vocabulary[-1]) >= table.weight.shape[0]:
            raise CheckpointError(
                f"token id {int(vocabulary[-1])} is outside the vocabulary of {table.weight.shape[0]}",
                where=self.weights.checkpoint.name,
                remedy="Tokenizer and weights do not belong together.",
            )
        padding_idx = table.padding_idx
        rows = self.weights.checkpoint.read_rows(self._table_name(), vocabulary)
        full = table._parameters["weight"]
        try:
            table.padding_idx = None
            table._parameters["weight"] = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
            self._vocabulary = vocabulary
            with self._outer_parameters(table):
                yield
        finally:
            table.padding_idx = padding_idx
            table._parameters["weight"] = full

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Load what :meth:`logits` needs: final norm and output projection."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        with self.embeddings(torch.zeros(1, dtype=torch.int64)):
            kept = output._parameters["weight"]
            output._parameters["weight"] = nn.Parameter(
                self._head_weight().to(self.device, self.dtype), requires_grad=False
            )
            try:
                yield
            finally:
                output._parameters["weight"] = kept

    @contextlib.contextmanager
    def _outer_parameters(self, table: nn.Module) -> Iterator[None]:
        """Load the decoder's parameters outside its blocks and outside the embedding table."""
        parent = self.disk_prefix.rpartition(".")[0]
        inside = {id(m) for m in self.layers.modules()} | {id(table)}
        loaded: list[tuple[nn.Module, str]] = []
        try:
            for path, module in self.decoder.named_modules():
                if id(module) in inside:
                    continue
                for leaf, _ in list(module.named_parameters(recurse=False)):
                    inner = f"{path}.{leaf}" if path else leaf
                    name = self._existing(f"{parent}.{inner}" if parent else inner)
                    self._place(module, leaf, self.weights.dense(name))
                    loaded.append((module, leaf))
            yield
        finally:
            for module, leaf in loaded:
                _to_meta(module, leaf)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Load one block's weights, upcast to the compute dtype; they are freed on leaving."""
        block = self.layers[index]
        try:
            with mapped():
                for path, module in block.named_modules():
                    for leaf, _ in list(module.named_parameters(recurse=False)):
                        name = self.disk_name(index, f"{path}.{leaf}" if path else leaf)
                        early = None if self.ahead is None else self.ahead.take(name)
                        self._place(module, leaf, self.weights.dense(self._existing(name)) if early is None else early)
            if self.ahead is not None:
                names = self._parameter_names(index + 1) if index + 1 < self.num_blocks else ()
                self.ahead.ask(name for name in names if self.weights.has(name))
            with self._quantized_inputs(index, block):
                yield block
        finally:
            for module in block.modules():
                for leaf, _ in list(module.named_parameters(recurse=False)):
                    _to_meta(module, leaf)

    @contextlib.contextmanager
    def norm_after(self, index: int, path: str) -> Iterator[nn.Module | None]:
        """The norm that reads what block ``index`` leaves behind, loaded: the next block's at ``path``, or the last one
        of the decoder; ``None`` where there is no such."""
        if index + 1 < self.num_blocks:
            if path not in dict(self.layers[index + 1].named_modules()):
                yield None
                return
            norm, name = self.layers[index + 1].get_submodule(path), self.disk_name(index + 1, path)
        else:
            parent = self.disk_prefix.rpartition(".")[0]
            found = [(n, m) for n, m in self.decoder.named_children() if _is_norm(m)]
            if len(found) != 1:
                yield None
                return
            name, norm = f"{parent}.{found[0][0]}" if parent else found[0][0], found[0][1]
        leaves = [leaf for leaf, _ in norm.named_parameters(recurse=False)]
        try:
            for leaf in leaves:
                self._place(norm, leaf, self.weights.dense(self._existing(f"{name}.{leaf}")))
            yield norm
        finally:
            for leaf in leaves:
                _to_meta(norm, leaf)

    def _parameter_names(self, index: int) -> list[str]:
        return [self.disk_name(index, name) for name, _ in self.layers[index].named_parameters()]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The ``nn.Linear`` modules of a block by the names that the checkpoint gives them."""
        return {
            self.disk_name(index, path): module
            for path, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def embed(self, token_ids: torch.Tensor, intern: Interner) -> tuple[torch.Tensor, list[Arguments]]:
        """What enters the first block, and what each block is called with besides.

        Args:
            token_ids: ``[batch, tokens]`` int64. Needs :meth:`embeddings`.
            intern: keeps equal tensors once over all batches.

        Returns:
            hidden states ``[batch, tokens, hidden]`` and, for each block, positional and keyword arguments.
        """
        first: list[torch.Tensor] = []
        calls: list[Arguments | None] = [None] * self.num_blocks

        def recorder(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if not first:
                    first.append(hidden_states.clone())
                calls[index] = (intern.tree(args), intern.tree(self._without_plain_mask(kwargs)))
                return hidden_states

            return forward

        with self._forwards(recorder), torch.no_grad():
            self.decoder(input_ids=torch.searchsorted(self._vocabulary, token_ids).to(self.device), use_cache=False)
        missing = [i for i, c in enumerate(calls) if c is None]
        if missing:
            raise ArchitectureError(
                f"blocks {missing} were never called by {type(self.decoder).__name__}",
                where=self.weights.checkpoint.name,
                remedy="This architecture runs its blocks in a way that halfbyte does not know yet.",
            )
        return first[0], [c for c in calls if c is not None]

    def _without_plain_mask(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without the mask where it says no more than "causal": torch's attention then leaves out the masked half.

        transformers makes a dense mask for sliding layers, also where the window is longer than the sequence.
        """
        mask = kwargs.get("attention_mask")
        config = getattr(self.decoder, "config", None)
        if not isinstance(mask, torch.Tensor) or getattr(config, "_attn_implementation", "") not in ("sdpa", PRODUCTS):
            return kwargs
        return kwargs | {"attention_mask": None} if is_plain_causal(mask) else kwargs

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` in float32 from the last block's output, by the model's own head.

        Final norm, projection, soft-capping and scaling are the model's: its blocks are made to return ``hidden``.
        Needs :meth:`head`.
        """

        def inject(index: int) -> Callable[..., torch.Tensor]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                return hidden

            return forward

        with self._forwards(inject), torch.no_grad():
            placeholder = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
            output = self.model(input_ids=placeholder, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits.float()

    @contextlib.contextmanager
    def _forwards(self, make: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
        """Replace every block's ``forward``; attributes that the decoder reads from blocks stay."""
        try:
            for i, layer in enumerate(self.layers):
                layer.forward = make(i)
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @contextlib.contextmanager
    def _quantized_inputs(self, index: int, block: nn.Module) -> Iterator[None]:
        """Where the checkpoint's scheme quantises activations, Linears see them as an engine would make them."""
        handles = []
        for path, module in block.named_modules():
            fmt = self.weights.activation_format(self.disk_name(index, path)) if isinstance(module, nn.Linear) else None
            if fmt is not None:

                def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], fmt: Any = fmt) -> tuple[torch.Tensor, ...]:
                    return (fake_quantize_activations(inputs[0], fmt), *inputs[1:])

                handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _existing(self, name: str) -> str:
        if not self.weights.has(name):
            raise CheckpointError(
                f"tensor {name} is absent, which {type(self.model).__name__} needs",
                where=self.weights.checkpoint.name,
                remedy="The checkpoint is incomplete or of another architecture than its config says.",
            )
        return name

    def _place(self, module: nn.Module, leaf: str, value: torch.Tensor) -> None:
        parameter = module._parameters[leaf]
        if parameter is not None and parameter.shape != value.shape:
            raise CheckpointError(
                f"a parameter {leaf} of {type(module).__name__} has shape {tuple(value.shape)}, "
                f"the config asks for {tuple(parameter.shape)}",
                where=self.weights.checkpoint.name,
            )
        module._parameters[leaf] = nn.Parameter(value.to(self.device, self.dtype), requires_grad=False)

    def _table_name(self) -> str:
        parent = self.disk_prefix.rpartition(".")[0]
        return self._existing(f"{parent}.embed_tokens.weight" if parent else "embed_tokens.weight")

    def head_name(self) -> str:
        """The tensor that projects to logits: one of its own, or the input embeddings where they are tied."""
        own = [name for name in self.weights.names() if name.endswith("lm_head.weight")]
        return own[0] if own else self._table_name()

    def _head_weight(self) -> torch.Tensor:
        return self.weights.dense(self.head_name())


def _is_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def is_plain_causal(mask: torch.Tensor) -> bool:
    """Whether an attention mask ``[batch, 1, queries, keys]`` lets each position see itself and all before it.

    True or 0 means seen; False or the dtype's least number means not.
    """
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        return False
    return torch.equal(seen, torch.ones_like(seen).tril())


def run_block(block: nn.Module, hidden: torch.Tensor, arguments: Arguments) -> torch.Tensor:
    """One block's output ``[batch, tokens, hidden]``."""
    args, kwargs = arguments
    with torch.no_grad():
        output = block(hidden, *args, **kwargs)
    result = output[0] if isinstance(output, tuple) else output
    assert isinstance(result, torch.Tensor)
    return result


def require_finite(
    block: nn.Module, name: str, hidden: torch.Tensor, output: torch.Tensor, arguments: Arguments, samples: list[int]
) -> None:
    """Stop when a block's output holds NaN or infinity, naming the first module and sample that made one.

    Raises:
        NumericsError: with the block, the module, the sample and what to do.
    """
    if bool(torch.isfinite(output.sum())):
        return
    finite = torch.isfinite(output).flatten(1).all(dim=1)
    if bool(finite.all()):  # the sum overflowed, the values did not
        return
    row = int(torch.nonzero(~finite)[0])
    culprit: list[str] = []
    handles = []
    for path, module in block.named_modules():

        def look(_: nn.Module, __: Any, out: Any, path: str = path) -> None:
            value = out[0] if isinstance(out, tuple) else out
            if not culprit and isinstance(value, torch.Tensor) and not bool(torch.isfinite(value[row]).all()):
                culprit.append(path)

        handles.append(module.register_forward_hook(look))
    run_block(block, hidden, arguments)
    for handle in handles:
        handle.remove()
    where = f"{name}.{culprit[0]}" if culprit and culprit[0] else name
    raise NumericsError(
        f"activations are not finite for calibration sample {samples[row]}",
        where=where,
        why="the block's weights or the sample's tokens overflow the compute dtype",
        remedy="Check the source weights with `halfbyte inspect`, or calibrate with other text.",
    )


def require_finite_weights(modules: Mapping[str, nn.Linear]) -> None:
    """Stop on NaN or infinity in a weight, naming it."""
    for name, module in modules.items():
        if not bool(torch.isfinite(module.weight).all()):
            raise not_finite(f"{name}.weight")


def not_finite(name: str) -> NumericsError:
    return NumericsError(
        "the source weight holds NaN or infinity", where=name, remedy="Download the checkpoint again, or --ignore it."
    )


class Interner:
    """Keeps equal tensors once: arguments recorded for many blocks and batches share their storage."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], torch.Tensor] = {}

    def tree(self, value: Any) -> Any:
        """The same structure of tuples, lists and mappings with each tensor replaced by its kept equal."""
        if isinstance(value, torch.Tensor):
            digest = hashlib.sha256(bytes_of(value.cpu())).digest()
            return self._known.setdefault((value.dtype, value.shape, digest), value)
        if isinstance(value, tuple):
            return tuple(self.tree(v) for v in value)
        if isinstance(value, list):
            return [self.tree(v) for v in value]
        if isinstance(value, Mapping):
            return {k: self.tree(v) for k, v in value.items()}
        return value


def build_on_meta(checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The module tree that transformers makes of a config: parameters on meta, buffers (rope tables) real.

    Raises:
        ArchitectureError: transformers does not know the architecture, or it needs code from the checkpoint.
    """
    import transformers
    from accelerate import init_empty_weights

    remedy = "Update transformers if the model is newer than it; code from checkpoints is never run."
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        except (ValueError, KeyError, OSError, TypeError, AttributeError) as e:
            raise ArchitectureError(
                f"transformers {transformers.__version__} cannot read its config: {str(e).splitlines()[0]}",
                where=checkpoint.name,
                remedy=remedy,
            ) from None
        quantization = config.to_dict().get("quantization_config")
        if quantization is not None:
            del config.quantization_config
        known = vars(transformers.models.auto.modeling_auto)["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"].values()
        factory: Any = transformers.AutoModelForCausalLM
        if checkpoint.architecture not in known:
            factory = transformers.AutoModelForImageTextToText
        try:
            with init_empty_weights(include_buffers=False):
                model = factory.from_config(config, dtype=dtype, trust_remote_code=False)
        except (ValueError, KeyError, ImportError) as e:
            raise ArchitectureError(
                f"architecture {checkpoint.architecture} cannot be built: {str(e).splitlines()[0]}",
                where=checkpoint.name,
                remedy=remedy,
            ) from None
    assert isinstance(model, nn.Module)
    return model.eval()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """transformers' logger at error level: its notes on configs are of no use to whoever quantises."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _to_meta(module: nn.Module, leaf: str) -> None:
    parameter = module._parameters[leaf]
    if parameter is not None and not parameter.is_meta:
        module._parameters[leaf] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
