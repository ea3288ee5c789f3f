"""The native engine: the C++ decoder over packed weights, read from a checkpoint without torch or transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from quantlab import native
from quantlab.adapters.combine import Source as AdapterSource
from quantlab.adapters.combine import Weighted
from quantlab.checkpoint import Checkpoint, Tokenizer, load_tokenizer, open_checkpoint
from quantlab.checkpoint.expected_shapes import check_shapes
from quantlab.errors import InputError
from quantlab.generation.branches import Branches
from quantlab.generation.chosen_adapters import (
    choose_adapters,
    fingerprint_of,
    fused_weights,
    stacked_factors,
)
from quantlab.generation.decoder_adapters import decoder_adapters
from quantlab.generation.decoder_description import ACTIVATIONS, NORMS, Description, describe
from quantlab.generation.decoder_layout import DecoderLayout
from quantlab.generation.decoder_loader import Loader, Matrix
from quantlab.generation.engine import Engine, OnChunk
from quantlab.generation.memory import TILE_POSITIONS, check_branches, check_memory, needed_memory
from quantlab.generation.prompt_cache import PromptCache
from quantlab.generation.saved_cache import read_cache, write_cache

CACHE_TYPES = ("f32", "f16", "q8_0")  # in the order of the core's enumeration
ACTIVATION_TYPES = ("int8", "f32")
MAX_THREADS = 1024  # the core's limit
DEFAULT_CONTEXT = 4096  # tokens, where the model could hold more: a cache is allocated for all of them


class NativeEngine(Engine):
    """See `Engine`. The same weights and tokens give the same logits, bit for bit, however they are cut into calls.

    Attributes:
        adapters: those in use, without the ones of weight 0.
        prompt_cache: where `prefill` looks sequences up and keeps them, if anywhere.
        weight_bytes: that computing a token reads, adapters' factors included.

    Args:
        checkpoint: float or packed, of any family.
        threads: to compute with; by default one a core.
        context: the most tokens; by default the model's own, but no more than 4096.
        kv: element type of the cache: "f16", "f32" or "q8_0".
        activations: "int8", rounded before they meet packed weights, in blocks of 32 or, for ternary weights, by token;
            or "f32".
        adapters: see `set_adapters`.

    Raises:
        InputError: the model asks for something that the decoder does not compute, its tensors are not those of its
            configuration, it does not fit into memory, or an argument is wrong.
    """

    name = "native"
    has_branches = True
    exact_batches = True

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int | None = None,
        context: int | None = None,
        kv: str = "f16",
        activations: str = "int8",
        adapters: Sequence[AdapterSource] | None = None,
    ) -> None:
        super().__init__()
        if kv not in CACHE_TYPES:
            raise InputError(f"kv {kv!r}: choose one of: {', '.join(CACHE_TYPES)}")
        if activations not in ACTIVATION_TYPES:
            raise InputError(f"activations {activations!r}: choose one of: {', '.join(ACTIVATION_TYPES)}")
        if threads is not None and threads < 1:
            raise InputError(f"threads {threads}: at least 1 is needed")
        if threads is not None and threads > MAX_THREADS:
            raise InputError(f"threads {threads}: at most {MAX_THREADS} can be used")
        native.cpu_kernel()  # an error for a kernel that does not exist
        check_shapes(checkpoint)
        self._checkpoint, self._path = checkpoint, checkpoint.path
        self.description = describe(checkpoint.config, str(checkpoint.path))
        sizes = self.description.sizes
        self.context = min(DEFAULT_CONTEXT if context is None else context, sizes.context)
        if self.context < 1:
            raise InputError(f"context {context}: at least 1 token is needed")
        if kv == "q8_0" and sizes.head_dim % 32:
            raise InputError(f"kv q8_0: {self._path} has heads of {sizes.head_dim}, no multiple of 32; choose f16")
        chosen = choose_adapters(adapters or (), checkpoint)  # wrong ones are told of before the model is read
        check_memory(str(self._path), needed_memory(checkpoint, self.description, self.context, kv))
        self.kv, self.activations = kv, activations
        self._layout = DecoderLayout(checkpoint, sizes)
        loader = Loader(checkpoint, self.description, self._layout, self.context)
        self._weights, self._matrices = loader.load(), loader.matrices
        self.vocabulary = loader.vocabulary
        self.fingerprint = loader.fingerprint
        self._base_bytes = loader.weight_bytes
        self._threads = threads or native.default_threads()
        self._fused: tuple[str, ...] = ()
        self.prompt_cache: PromptCache | None = None
        self._decoder = self._new_decoder()
        self._apply(chosen)

    def _new_decoder(self) -> native.Decoder:
        """A decoder over the weights, which it shares."""
        spec, cache = _spec(self.description, self.vocabulary), CACHE_TYPES.index(self.kv)
        try:
            return native.Decoder(spec, self._weights, self.context, cache, self.activations == "int8", self._threads)
        except ValueError as error:
            raise InputError(f"{self._path}: the files are not those of its configuration: {error}") from None

    def set_adapters(self, adapters: Sequence[AdapterSource]) -> None:
        """Compute with these adapters instead of those so far; none gives the model itself again.

        Beside each adapted weight W, y = W x becomes y + sum of weight * scale * B (A x), in fp32 from activations that
        are not rounded. The weights stay as they are, so this takes no longer than reading the adapters. Adapters that
        were trained for fused blocks (block-sum, merge-aware) are applied to a packed base as `fuse` writes them, bit
        for bit: copies of these weights are made, and the base's own stay at hand. The sequence is forgotten: what is
        cached of its tokens was computed with other adapters. On an error nothing changes.

        Args:
            adapters: `Adapter` or an adapter's folder, each alone or as (adapter, weight).

        Raises:
            InputError: see `choose_adapters`.
        """
        self._apply(choose_adapters(adapters, self._checkpoint))

    def _apply(self, chosen: tuple[Weighted, ...]) -> None:
        blocks = fused_weights(chosen, self._checkpoint, self._threads)
        factors = stacked_factors(chosen, blocks)
        made = decoder_adapters(factors, self._layout, self.description.sizes.blocks)
        matrices = {name: self._packed(name, packed) for name, packed in blocks.items()}
        try:
            self._decoder.set_adapters(made)
        except ValueError as error:
            raise InputError(f"{self._path}: {error}") from None
        if matrices or self._fused:
            for name in {*matrices, *self._fused}:
                for layer, role, matrix in matrices.get(name, self._matrices[name]):
                    self._weights.set_matrix(layer, role, matrix)
            self._fused = tuple(matrices)
            self._decoder = self._new_decoder()
            self._decoder.set_adapters(made)
        self.adapters = chosen
        self.weight_bytes = self._base_bytes + sum(a.nbytes + b.nbytes for a, b in factors.values())
        self.tokens, self._logits = [], None

    def _packed(self, name: str, blocks: np.ndarray) -> list[Matrix]:
        """The decoder's matrices of a tensor, from its blocks."""
        order, (layer, kind, _) = self._layout.row_order(name), self._layout.place(name)
        columns, found = self._checkpoint.shape(name)[1], []
        for role, rows in self._layout.roles(name, kind):
            chosen = blocks[rows.start : rows.stop] if order is None else blocks[order[rows.start : rows.stop]]
            matrix = native.PackedMatrix(self._checkpoint.stored_type(name), len(rows), columns)
            matrix.fill(0, np.ascontiguousarray(chosen))
            found.append((layer, role, matrix))
        return found

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self._path)

    def logits_of(self, token_ids: Sequence[int]) -> np.ndarray:
        """fp32 [tokens, vocabulary] after each token of a sequence that starts anew."""
        token_ids = self._checked(token_ids)
        self.rewind(0)
        return self.append_all(token_ids)

    def prefill(self, token_ids: Sequence[int], chunk: int | None = None, on_chunk: OnChunk | None = None) -> int:
        """See `Engine.prefill`; with a prompt cache, common prefixes of sequences of other processes count too."""
        if self.prompt_cache is None:
            return super().prefill(token_ids, chunk, on_chunk)
        token_ids = self._checked(token_ids)
        self.prompt_cache.restore(self, token_ids)
        common = super().prefill(token_ids, chunk, on_chunk)
        self.prompt_cache.save(self)
        return common

    def keep(self) -> None:
        """See `Engine.keep`."""
        if self.prompt_cache is not None:
            self.prompt_cache.save(self)

    def branches(self, count: int, room: int) -> Branches:
        """See `Engine.branches`; a row of their logits has the bits of the sequence continued by that branch alone."""
        self._forget(self.position)
        check_branches(count, self._decoder.branch_bytes(count, room))
        return Branches(self._decoder, self.vocabulary, count, room)

    def save(self, path: str | Path) -> None:
        """Write the sequence and its cache to a file, for `restore`.

        Raises:
            InputError: the file cannot be written.
        """
        write_cache(Path(path), self.identity(), self.tokens, self.cache_of(0, self.position))

    def restore(self, path: str | Path) -> bool:
        """Take over a saved sequence; `prefill` then reuses its common prefix, with the bits of a cold run.

        Returns:
            Whether it was taken over: not if the file is missing, damaged, longer than the context, or saved with other
            weights, adapters, cache or activation types; the engine is as it was then.
        """
        found = read_cache(Path(path), self.identity())
        if found is None:
            return False
        tokens, cache = found
        if not self._is_cache(tokens, cache) or len(tokens) > self.context:
            return False
        self.rewind(0)
        return self.take_cache(tokens, cache, len(tokens))

    def cache_of(self, first: int, last: int) -> np.ndarray:
        """The keys and values of tokens first .. last - 1, uint8; `first` is a multiple of 16."""
        self._forget(self.position)
        cache = np.empty(self._decoder.cache_bytes(last - first), np.uint8)
        self._decoder.export_cache(cache, first, last)
        return cache

    def take_cache(self, tokens: list[int], cache: np.ndarray, count: int) -> bool:
        """Append the first `count` of these tokens, whose cache is given, to a sequence that ends with a whole tile.

        Returns:
            Whether they were: not if these tokens cannot have such a cache; the engine is as it was then.
        """
        if not self._is_cache(tokens, cache):
            return False
        if count < len(tokens):  # some tiles of each head's keys and values
            sizes = self.description.sizes
            tiles = cache.reshape(2 * sizes.blocks * sizes.kv_heads, _tiles(len(tokens)), -1)
            cache = np.ascontiguousarray(tiles[:, : _tiles(count)]).reshape(-1)
        self._logits = None
        self._decoder.import_cache(cache, self.position, self.position + count)
        self.tokens.extend(tokens[:count])
        return True

    def _is_cache(self, tokens: Sequence[int], cache: np.ndarray) -> bool:
        known = len(tokens) > 0 and all(0 <= token < self.vocabulary for token in tokens)
        return known and cache.nbytes == _tiles(len(tokens)) * self._decoder.cache_bytes(1)

    def identity(self) -> dict[str, str]:
        """What a cache depends on besides the tokens."""
        model = f"{self.fingerprint} {fingerprint_of(self.adapters)}".strip()
        identity = {"fingerprint": model, "kv": self.kv, "activations": self.activations}
        scaled = [rope for rope in self.description.ropes if rope.kind == "longrope"]
        if any(self.context > rope.original_context for rope in scaled):
            identity["positions"] = "long"  # of a longer text, angles are others from the first token on
        return identity

    def _forward(self, token_ids: list[int], wanted: int) -> np.ndarray:
        logits = np.empty((wanted, self.vocabulary), np.float32)
        self._decoder.append(np.asarray(token_ids, np.int32), logits)
        return logits

    def _forget(self, position: int) -> None:
        self._decoder.rewind(position)


def _tiles(tokens: int) -> int:
    """That the cache of so many tokens has."""
    return math.ceil(tokens / TILE_POSITIONS)


def load_native(
    model: str | Path,
    *,
    threads: int | None = None,
    context: int | None = None,
    kv: str = "f16",
    activations: str = "int8",
    adapters: Sequence[AdapterSource] | None = None,
) -> NativeEngine:
    """Load a model into a native engine; see `NativeEngine`."""
    checkpoint = open_checkpoint(model)
    return NativeEngine(checkpoint, threads=threads, context=context, kv=kv, activations=activations, adapters=adapters)


def _spec(description: Description, vocabulary: int) -> native.DecoderSpec:
    sizes, spec = description.sizes, native.DecoderSpec()
    spec.layers, spec.hidden, spec.inner = sizes.blocks, sizes.width, sizes.feed_forward
    spec.heads, spec.kv_heads, spec.head_size = sizes.heads, sizes.kv_heads, sizes.head_dim
    spec.vocabulary, spec.epsilon = vocabulary, sizes.epsilon
    spec.norm, spec.activation = NORMS.index(description.norm), ACTIVATIONS.index(description.activation)
    spec.gated, spec.parallel_residual = description.gated, description.parallel_residual
    spec.rotated = description.ropes[0].dims if description.ropes else 0
    spec.embedding_scale, spec.attention_scale = description.embedding_scale, description.attention_scale
    spec.attention_cap, spec.logit_cap = description.attention_cap, description.logit_cap
    spec.windows, spec.rope_tables = list(description.windows), list(description.rope_tables)
    return spec
