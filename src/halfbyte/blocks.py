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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from halfbyte.activations import fake_quantize_activations
from halfbyte.architectures import NOT_LANGUAGE, find_block_prefix
from halfbyte.attention import NAME as PRODUCTS
from halfbyte.attention import use_products
from halfbyte.checkpoint.reader import Checkpoint, bytes_of
from halfbyte.checkpoint.stacks import unstacked
from halfbyte.errors import ArchitectureError, CheckpointError, NumericsError
from halfbyte.estimates import RESIDENT_EXPERTS
from halfbyte.experts import LEAVES as EXPERT_PARTS
from halfbyte.experts import Expert, Experts, unfuse
from halfbyte.gpu import works_ahead
from halfbyte.heap import mapped
from halfbyte.names import Names
from halfbyte.read_ahead import ReadAhead
from halfbyte.routed import ExpertLayer
from halfbyte.weights import Weights


class TupleWanted(Exception):
    """Raised inside the model when it takes what its blocks return for tuples."""


class PassRecorded(Exception):
    """Raised inside the model when its last block has been called: the rest of the pass is not needed."""


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a block is called with besides the hidden states, and what the model adds to these before.

    Attributes:
        args, kwargs: as the model passes them.
        rows, added: positions ``[n]`` int64 among ``batch * tokens``, and what is added there ``[n, hidden]``: features
            of pictures that enter behind the first block (Qwen3-VL's DeepStack). Empty mostly.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: torch.Tensor | None = None
    added: torch.Tensor | None = None

    def run(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """The block's output ``[batch, tokens, hidden]``."""
        if self.rows is not None and self.added is not None:
            hidden = hidden.clone()
            hidden.flatten(0, 1).index_add_(0, self.rows.to(hidden.device), self.added.to(hidden))
        output = block(hidden, *self.args, **self.kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, torch.Tensor)
        return result


@dataclass(slots=True)
class StreamedModel:
    """A causal language model, streamed.

    Attributes:
        weights: where parameters come from.
        model: the whole module tree; parameters are on the meta device unless loaded.
        decoder: the module that holds the block list, the language model without its head.
        layers: the block list; path: where it is in the tree.
        names: how the checkpoint spells the tree's parameters.
        disk_prefix: path of the block list in the checkpoint's names.
        experts: layers of experts, by path.
        device: where blocks run; dtype: what they compute in.
        ahead: fetches a block's weights while the one before is worked on; ``None`` on a CPU.
        adds_between: whether the model was seen to add something to hidden states between blocks.
        in_tuples: whether its blocks return tuples, of which it takes the first (Falcon).
    """

    weights: Weights
    model: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    path: str
    names: Names
    disk_prefix: str
    experts: Mapping[str, Experts]
    device: torch.device
    dtype: torch.dtype
    ahead: ReadAhead | None = None
    adds_between: bool = False
    in_tuples: bool = False

    @staticmethod
    def of(weights: Weights, device: torch.device, dtype: torch.dtype | None = None) -> StreamedModel:
        """Build the module tree of a checkpoint.

        Args:
            weights: its parameters.
            device: where blocks run.
            dtype: what they compute in; ``None`` is the checkpoint's on a GPU and float32 on a CPU.
        """
        weights = replace(weights, checkpoint=unstacked(weights.checkpoint))
        checkpoint = weights.checkpoint
        if dtype is None:
            dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype
        model = build_on_meta(checkpoint, dtype)
        say_device(model, device)
        fused = list(model.state_dict(keep_vars=True))
        experts = unfuse(model)
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
        names = Names.of(model, weights.names(), fused, checkpoint)
        ahead = ReadAhead.onto(weights.dense, device, dtype) if works_ahead(device) else None
        streamed = StreamedModel(
            weights, model, decoder, layers, path, names, disk_prefix, experts, device, dtype, ahead
        )
        for layer in experts.values():
            layer.fetch = streamed.fetched
        return streamed

    @property
    def num_blocks(self) -> int:
        return len(self.layers)

    def disk_name(self, index: int, name: str) -> str:
        """A block's parameter, as the checkpoint spells it."""
        path = f"{self.path}.{index}.{name}"
        return self.names.on_disk.get(path, f"{self.disk_prefix}.{index}.{name}")

    def linear_name(self, index: int, path: str) -> str:
        """A block's Linear, as the checkpoint spells it."""
        return self.disk_name(index, f"{path}.weight").removesuffix(".weight")

    @contextlib.contextmanager
    def embeddings(self, vocabulary: torch.Tensor, *, pictures: bool = False) -> Iterator[None]:
        """Load what :meth:`embed` needs: of the embedding table only the rows in use, and small parameters.

        A table of 262,144 x 5,376 takes 5.6 GB in float32; the tokens of a calibration set use a few per cent of it.

        Args:
            vocabulary: ``[n]`` int64, sorted unique token ids that will be embedded.
            pictures: load what makes features of pictures, too: vision tower and projector.
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
        handle = table.register_forward_pre_hook(self._compact(vocabulary))
        try:
            table.padding_idx = None
            table._parameters["weight"] = nn.Parameter(rows.to(self.device, self.dtype), requires_grad=False)
            with self._outer_parameters(self.model if pictures else self.decoder, table):
                yield
        finally:
            handle.remove()
            table.padding_idx = padding_idx
            table._parameters["weight"] = full

    def _compact(self, vocabulary: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """From token ids to rows of the table that holds only these; placeholders outside of it become row 0."""

        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            rows = torch.searchsorted(vocabulary, inputs[0].cpu().contiguous())
            return (rows.clamp_(max=max(0, len(vocabulary) - 1)).to(self.device), *inputs[1:])

        return hook

    @contextlib.contextmanager
    def head(self) -> Iterator[None]:
        """Load what :meth:`logits` needs: final norm and output projection."""
        output = self.model.get_output_embeddings()  # type: ignore[operator]
        with self.embeddings(torch.zeros(1, dtype=torch.int64)):
            kept = output._parameters["weight"]
            output._parameters["weight"] = nn.Parameter(
                self._head_weight().to(self.device, self.dtype), requires_grad=False
            )
            bias = output._parameters.get("bias")
            if bias is not None:
                self._place(output, "bias", self.weights.dense(self._existing(self._path_of(output), "bias")))
            try:
                yield
            finally:
                output._parameters["weight"] = kept
                if bias is not None:
                    _to_meta(output, "bias")

    @contextlib.contextmanager
    def _outer_parameters(self, root: nn.Module, table: nn.Module) -> Iterator[None]:
        """Load a module's parameters outside the blocks, the embedding table and the output head."""
        inside = {id(m) for m in self.layers.modules()} | {id(table)}
        inside.add(id(self.model.get_output_embeddings()))  # type: ignore[operator]
        prefix = self._path_of(root)
        loaded: list[tuple[nn.Module, str]] = []
        try:
            for path, module in root.named_modules():
                if id(module) in inside:
                    continue
                full = ".".join(part for part in (prefix, path) if part)
                for leaf, _ in list(module.named_parameters(recurse=False)):
                    self._place(module, leaf, self.weights.dense(self._existing(full, leaf)))
                    loaded.append((module, leaf))
                self._buffers(full, module)
            yield
        finally:
            for module, leaf in loaded:
                _to_meta(module, leaf)

    def _buffers(self, path: str, module: nn.Module) -> None:
        """What a checkpoint holds for buffers (Llama 4's class embedding is none, some towers' positions are)."""
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            name = self.names.on_disk.get(f"{path}.{leaf}")
            if name is not None and buffer is not None:
                module._buffers[leaf] = self.weights.dense(name).to(self.device, buffer.dtype)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Load one block's weights, upcast to the compute dtype; they are freed on leaving.

        Experts that are too many to be in memory together stay out: each is fetched when it is called.
        """
        block = self.layers[index]
        absent = set() if self.resident(index) else {id(m) for m in self._expert_parts(block)}
        try:
            with mapped():
                for path, module in block.named_modules():
                    if id(module) in absent:
                        continue
                    full = ".".join(part for part in (self.path, str(index), path) if part)
                    for leaf, _ in list(module.named_parameters(recurse=False)):
                        name = self._existing(full, leaf)
                        early = None if self.ahead is None else self.ahead.take(name)
                        self._place(module, leaf, self.weights.dense(name) if early is None else early)
                    self._buffers(full, module)
            if self.ahead is not None:
                names = self._parameter_names(index + 1) if index + 1 < self.num_blocks else ()
                self.ahead.ask(name for name in names if self.weights.has(name))
            with self._quantized_inputs(index, block):
                yield block
        finally:
            for module in block.modules():
                for leaf, _ in list(module.named_parameters(recurse=False)):
                    _to_meta(module, leaf)

    def resident(self, index: int) -> bool:
        """Whether all experts of a block are in memory while it is worked on."""
        parts = self._expert_parts(self.layers[index])
        return sum(p.numel() for m in parts for p in m.parameters(recurse=False)) * self.dtype.itemsize <= (
            RESIDENT_EXPERTS
        )

    @staticmethod
    def _expert_parts(block: nn.Module) -> list[nn.Module]:
        return [part for m in block.modules() if isinstance(m, Expert) for part in m.modules()]

    @contextlib.contextmanager
    def fetched(self, expert: Expert) -> Iterator[None]:
        """One expert's weights, for a while."""
        path = self._path_of(expert)
        try:
            with mapped():
                for leaf, module in expert.named_children():
                    for parameter, _ in list(module.named_parameters(recurse=False)):
                        name = self._existing(f"{path}.{leaf}", parameter)
                        self._place(module, parameter, self.weights.dense(name))
                        if not all_finite(module.get_parameter(parameter)):
                            raise not_finite(name)
            yield
        finally:
            for module in expert.children():
                for parameter, _ in list(module.named_parameters(recurse=False)):
                    _to_meta(module, parameter)

    @contextlib.contextmanager
    def norm_after(self, index: int, path: str) -> Iterator[nn.Module | None]:
        """The norm that reads what block ``index`` leaves behind, loaded: the next block's at ``path``, or the last one
        of the decoder; ``None`` where there is no such."""
        if index + 1 < self.num_blocks:
            if path not in dict(self.layers[index + 1].named_modules()):
                yield None
                return
            norm = self.layers[index + 1].get_submodule(path)
        else:
            found = [m for m in self.decoder.children() if _is_norm(m)]
            if len(found) != 1:
                yield None
                return
            norm = found[0]
        leaves = [leaf for leaf, _ in norm.named_parameters(recurse=False)]
        try:
            for leaf in leaves:
                self._place(norm, leaf, self.weights.dense(self._existing(self._path_of(norm), leaf)))
            yield norm
        finally:
            for leaf in leaves:
                _to_meta(norm, leaf)

    def _parameter_names(self, index: int) -> list[str]:
        return [self.disk_name(index, name) for name, _ in self.layers[index].named_parameters()]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The ``nn.Linear`` modules of a block by the names that the checkpoint gives them."""
        return {
            self.linear_name(index, path): module
            for path, module in self.layers[index].named_modules()
            if isinstance(module, nn.Linear)
        }

    def expert_layers(self, index: int, linears: Mapping[str, nn.Linear]) -> dict[str, ExpertLayer]:
        """A block's layers of experts whose Linears are among these, by the names that the checkpoint gives them."""
        layers = {}
        for path, module in self.layers[index].named_modules():
            if not isinstance(module, Experts):
                continue
            names = [
                {leaf: self.linear_name(index, f"{path}.{number}.{leaf}") for leaf in EXPERT_PARTS}
                for number in range(len(module))
            ]
            if all(name in linears for expert in names for name in expert.values()):
                layers[names[0]["down_proj"].rpartition(".")[0].rpartition(".")[0]] = ExpertLayer(module, names)
        return layers

    def embed(
        self, token_ids: torch.Tensor, intern: Interner, inputs: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """What enters the first block, and what each block is called with besides.

        Args:
            token_ids: ``[batch, tokens]`` int64. Needs :meth:`embeddings`.
            intern: keeps equal tensors once over all batches.
            inputs: what else the model takes, such as ``pixel_values``; the whole model then runs, its vision tower
                too, and not only the language model. Needs :meth:`embeddings` with ``pictures``.

        Returns:
            hidden states ``[batch, tokens, hidden]`` and, for each block, positional and keyword arguments.
        """
        if self.adds_between:
            return self._recorded(token_ids, intern, inputs, 0.0)
        try:
            first, calls = self._recorded(token_ids, intern, inputs, 1.0)
        except TupleWanted:
            self.in_tuples = True
            first, calls = self._recorded(token_ids, intern, inputs, 1.0)
        if any(call.added is not None for call in calls):
            first, exact = self._recorded(token_ids, intern, inputs, 0.0)
            if not all(_same_added(one, other) for one, other in zip(calls, exact, strict=True)):
                raise ArchitectureError(
                    f"{type(self.decoder).__name__} changes hidden states between its blocks",
                    where=self.weights.checkpoint.name,
                    remedy="This architecture runs its blocks in a way that halfbyte does not know yet.",
                )
            calls, self.adds_between = exact, True
        return first, calls

    def _recorded(
        self, token_ids: torch.Tensor, intern: Interner, inputs: Mapping[str, torch.Tensor] | None, factor: float
    ) -> tuple[torch.Tensor, list[Arguments]]:
        """One pass with blocks that multiply by a factor; what comes to a block beyond that was added in between (and
        is exact where the factor is 0)."""
        first: list[torch.Tensor] = []
        left: list[torch.Tensor] = []
        calls: list[Arguments | None] = [None] * self.num_blocks

        def recorder(index: int) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                rows = added = None
                if not first:
                    first.append(hidden_states.clone())
                elif hidden_states.dim() < first[0].dim() and not self.in_tuples:
                    raise TupleWanted
                elif not torch.equal(hidden_states, left[-1]):
                    difference = (hidden_states - left[-1]).flatten(0, 1)
                    rows = torch.nonzero(difference.any(dim=-1)).flatten()
                    added = difference[rows]
                kept = intern.tree(self._without_plain_mask(kwargs))
                calls[index] = Arguments(intern.tree(args), kept, rows, added)
                if index + 1 == self.num_blocks:
                    raise PassRecorded
                left[:] = [hidden_states * factor]
                return self._returned(left[-1].clone())  # the model may change it in place

            return forward

        with self._forwards(recorder), torch.no_grad(), contextlib.suppress(PassRecorded):
            ids = token_ids.to(self.device)
            if inputs is None:
                self.decoder(input_ids=ids, use_cache=False)
            else:
                self.model(input_ids=ids, use_cache=False, **{k: self._fitting(v) for k, v in inputs.items()})
        missing = [i for i, c in enumerate(calls) if c is None]
        if missing:
            raise ArchitectureError(
                f"blocks {missing} were never called by {type(self.decoder).__name__}",
                where=self.weights.checkpoint.name,
                remedy="This architecture runs its blocks in a way that halfbyte does not know yet.",
            )
        return first[0], [c for c in calls if c is not None]

    def _returned(self, hidden: torch.Tensor) -> Any:
        return (hidden,) if self.in_tuples else hidden

    def _fitting(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    def _without_plain_mask(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Without the mask where it says no more than "causal": torch's attention then leaves out the masked half.

        transformers makes a dense mask for sliding layers, also where the window is longer than the sequence.
        """
        mask = kwargs.get("attention_mask")
        config = getattr(self.decoder, "config", None)
        if not isinstance(mask, torch.Tensor) or getattr(config, "_attn_implementation", "") not in ("sdpa", PRODUCTS):
            return kwargs
        return kwargs | {"attention_mask": None} if is_plain_causal(mask) else kwargs

    def logits(self, hidden: torch.Tensor, *, gradient: bool = False) -> torch.Tensor:
        """Logits ``[batch, tokens, vocabulary]`` in float32 from the last block's output, by the model's own head.

        Final norm, projection, soft-capping and scaling are the model's: its blocks are made to return ``hidden``.
        Needs :meth:`head`. With ``gradient``, they can be differentiated by ``hidden``.
        """

        def inject(index: int) -> Callable[..., Any]:
            def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return self._returned(hidden)

            return forward

        with self._forwards(inject), torch.set_grad_enabled(gradient):
            placeholder = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
            output = self.model(input_ids=placeholder, use_cache=False)
        logits: torch.Tensor = output.logits
        return logits.float()

    @contextlib.contextmanager
    def _forwards(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
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
        """Where the checkpoint's scheme quantises activations, Linears see them as an engine would make them. Gradients
        go straight through."""
        handles = []
        for path, module in block.named_modules():
            fmt = None
            if isinstance(module, nn.Linear):
                fmt = self.weights.activation_format(self.linear_name(index, path))
            if fmt is not None:

                def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], fmt: Any = fmt) -> tuple[torch.Tensor, ...]:
                    x = inputs[0]
                    made = fake_quantize_activations(x.detach(), fmt)
                    return (x + (made - x.detach()) if x.requires_grad else made, *inputs[1:])

                handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _existing(self, path: str, leaf: str) -> str:
        """The checkpoint's name of a module's parameter."""
        full = f"{path}.{leaf}" if path else leaf
        name = self.names.on_disk.get(full)
        if name is None:
            raise CheckpointError(
                f"tensor {full} is absent, which {type(self.model).__name__} needs",
                where=self.weights.checkpoint.name,
                remedy="The checkpoint is incomplete or of another architecture than its config says.",
            )
        return name

    def _path_of(self, module: nn.Module) -> str:
        return str(next(path for path, m in self.model.named_modules() if m is module))

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
        return self._existing(self._path_of(self.model.get_input_embeddings()), "weight")  # type: ignore[operator]

    def head_name(self) -> str:
        """The tensor that projects to logits: one of its own, or the input embeddings where they are tied."""
        output = self._path_of(self.model.get_output_embeddings())  # type: ignore[operator]
        own = self.names.on_disk.get(f"{output}.weight")
        return self._table_name() if own is None else own

    def _head_weight(self) -> torch.Tensor:
        return self.weights.dense(self.head_name())

    def after_blocks(self) -> list[str]:
        """The checkpoint's tensors that :meth:`logits` depends on: the decoder's own besides its blocks and embedding
        table, and the head."""
        table = self._path_of(self.model.get_input_embeddings())  # type: ignore[operator]
        prefix = self._path_of(self.decoder)
        inside = f"{self.path}."
        own = [
            name
            for path, name in self.names.on_disk.items()
            if path.startswith(f"{prefix}." if prefix else "") and not path.startswith((inside, f"{table}."))
        ]
        return list(dict.fromkeys([*own, self.head_name()]))


def _same_added(one: Arguments, other: Arguments) -> bool:
    if one.added is None or other.added is None or one.rows is None or other.rows is None:
        return one.added is other.added
    if not torch.equal(one.rows, other.rows):
        return False
    size = one.added.float().norm() + torch.finfo(torch.float32).tiny
    return float((one.added.float() - other.added.float()).norm() / size) < 0.05


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
    with torch.no_grad():
        return arguments.run(block, hidden)


def require_finite(
    block: nn.Module, name: str, hidden: torch.Tensor, output: torch.Tensor, arguments: Arguments, samples: list[int]
) -> None:
    """Stop when a block's output holds NaN or infinity, naming the first module and sample that made one.

    Raises:
        NumericsError: with the block, the module, the sample and what to do.
    """
    if all_finite(output):
        return
    finite = torch.isfinite(output).flatten(1).all(dim=1)
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


def all_finite(x: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite, at the cost of a sum where that is so (a sum may overflow by itself)."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def require_finite_weights(modules: Mapping[str, nn.Linear]) -> None:
    """Stop on NaN or infinity in a weight, naming it."""
    for name, module in modules.items():
        if not module.weight.is_meta and not all_finite(module.weight):
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
        # By the type too: what a config calls its class need not be transformers' name for it (PhiMoE's is not).
        kinds = vars(transformers.models.auto.modeling_auto)
        speaking, seeing = (kinds[f"MODEL_FOR_{k}_MAPPING_NAMES"] for k in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"))
        factory: Any = transformers.AutoModelForCausalLM
        if checkpoint.architecture not in speaking.values() and config.model_type in seeing:
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


def say_device(model: nn.Module, device: torch.device) -> None:
    """Let every part of a model name the device that it works on, though most of its parameters are on meta: some
    place what they make by it."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            kind = type(module)
            placed = type(kind.__name__, (kind,), {"device": property(lambda _: device), "__module__": kind.__module__})
            placed.__qualname__ = kind.__qualname__
            module.__class__ = placed


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
