"""kNN-LM: the next token of similar places in a store of text (Khandelwal et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from memwrap.io.own_paths import is_own, mark_of
from memwrap.io.reading import inside
from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Bounds, Claims, LogitsMemory, SeesSegment, SegmentTokens
from memwrap.memories.registry import register
from memwrap.memories.settings import Kind, NonNegativeInt, PositiveInt, Range
from memwrap.memories.sizes import Sizes
from memwrap.ops import neighbours
from memwrap.ops.buffers import filled, ring, take
from memwrap.ops.interpolation import interpolate
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree
from memwrap.stores import Store, open_store
from memwrap.stores.urls import is_url, without_password

FOLDER, STORE_PATH = "knnlm_store", "knnlm_store_path"
WEIGHT, TEMPERATURE = 0.25, 1.0


class KnnLMConfig(MemoryConfig):
    """The model's distribution is mixed with that of the tokens that followed similar places, in a
    store of any text, or in what was read so far.

    Examples:
        >>> import memwrap
        >>> memwrap.KnnLMConfig(cache_size=4096).top_k
        64

    Attributes:
        store: folder or URL of a store made by `memwrap store build`. `None`: none, or the one that
            is given to `attach`.
        top_k: neighbours of every token (the paper: 1024).
        interpolation: lambda, the neighbours' share. `None`: as tuned for the store, else 0.25.
        temperature: divides the neighbours' distances. `None`: as tuned for the store, else 1.
        adaptive: temperature times the mean distance of a token's neighbours, and lambda times
            exp(-d_1 / `distance_scale`) with the distance d_1 of the nearest.
        distance_scale: see `adaptive`; `None`: as tuned for the store, else no such factor.
        key: what stands for a place: `"ffn"`, what the last layer's feed-forward block is given (as
            published), or `"hidden"`, the last hidden state.
        metric: `"l2"`, squared distances, or `"ip"`, negated inner products.
        cache_size: entries of the text read so far that are kept in the state and searched beside
            the store; of too many the oldest go.
    """

    name: ClassVar[str] = "knnlm"
    not_in_state: ClassVar[frozenset[str]] = frozenset(
        {"store", "top_k", "interpolation", "temperature", "adaptive", "distance_scale"}
    )

    store: Annotated[str, Kind("text that names a folder or a URL", bool)] | None = None
    top_k: PositiveInt = 64
    interpolation: Annotated[float, Range(0, 0.999)] | None = None
    temperature: Annotated[float, Range(1e-9)] | None = None
    adaptive: bool = False
    distance_scale: Annotated[float, Range(1e-9)] | None = None
    key: Literal["ffn", "hidden"] = "ffn"
    metric: Literal["l2", "ip"] = "l2"
    cache_size: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if isinstance(self.store, str) and Path(self.store).is_dir():
            self.store = str(Path(self.store).absolute())  # it is saved, and loaded from elsewhere

    def validate_distances(self) -> None:
        if self.adaptive and self.metric != "l2":
            self.refuse("adaptive", "False where `metric` is 'ip': it needs distances")

    def to_dict(self) -> dict[str, Any]:
        """Write the settings as every config does, but for the password of a store's URL: they go
        into files."""
        values = super().to_dict()
        if self.store is not None and is_url(self.store):
            values["store"] = without_password(self.store)
        return values

    @classmethod
    def tiny(cls) -> KnnLMConfig:
        # Adaptive: the distances of tiny random models differ by orders of magnitude.
        return cls(
            segment_size=8, top_k=24, cache_size=40, adaptive=True, temperature=0.3,
            interpolation=0.6,
        )  # fmt: skip


@register(KnnLMConfig)
class KnnLMMemory(LogitsMemory, SeesSegment):
    """Entries are (key at a token, next token). Those of the text itself are in the state, in
    rings `keys` `(B, 1, C, D)` and `tokens` `(B, 1, C, 1)` that grow up to `cache_size`; the last
    token of a segment waits in `last` until the next segment tells what followed it."""

    claims = Claims(neutral_start=True, bounded=False, lengthens=True)
    takes_store = True

    config: KnnLMConfig

    def __init__(self, config: KnnLMConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.key = config.key
        self.width = sizes.hidden_size if config.key == "ffn" else sizes.embedding_size
        if config.cache_size:
            self.bytes_per_token = self.width * sizes.dtype.itemsize + 8.0
            self.looks_at = frozenset({config.key, "ids"})
        self.store: Store | None = None

    def attach(self, store: Store | str | Path | None) -> None:
        """Search this store from now on; `None` for none. A store given here, rather than by
        `KnnLMConfig.store`, is saved beside the model.

        Raises:
            ValueError: if its vectors are not this model's keys.
        """
        opened = store if store is None or isinstance(store, Store) else open_store(store)
        if opened is not None:
            if (opened.dim, opened.metric) != (self.width, self.config.metric):
                raise ValueError(
                    f"The store holds vectors of width {opened.dim} with the metric "
                    f"{opened.metric!r}; this model's keys have {self.width} and "
                    f"{self.config.metric!r}."
                )
            kind = opened.notes.get("key", self.config.key)
            if kind != self.config.key:
                raise ValueError(f"The store's keys are {kind!r}, `key` is {self.config.key!r}.")
        self.store = opened

    def resettled(self, changed: set[str]) -> None:
        if "store" in changed:
            self.store = None
            self.open_named(self.config)

    def open_named(self, config: MemoryConfig) -> None:
        if isinstance(config, KnnLMConfig) and config.store is not None:
            self.attach(config.store)

    def save_files(self, new: Path, folder: Path) -> dict[str, str]:
        named = self.config.store
        if named is not None and not is_url(named) and Path(named).is_dir():
            return {STORE_PATH: mark_of(named)}
        if self.store is None or named is not None:
            return {}
        self.store.save_beside(new / FOLDER, folder / FOLDER)
        return {FOLDER: self.store.identity}

    def load_files(self, folder: Path, marks: dict[str, str] | None, store: Any) -> None:
        if store is not None:
            self.attach(None if store is False else store)
        elif self.config.store is not None:
            self.attach(_followed(folder, self.config.store, (marks or {}).get(STORE_PATH, "")))
        elif FOLDER in marks if marks is not None else (folder / FOLDER).is_dir():
            opened = open_store(inside(folder, FOLDER))
            if marks is not None and opened.identity != marks[FOLDER]:
                raise ValueError(
                    f"{folder / FOLDER} is not the store that this model was saved with; name the "
                    "one to search: memwrap.load(folder, store=...)."
                )
            self.attach(opened)

    # The text itself

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        if not self.config.cache_size:
            return {}
        make: dict[str, Any] = {"device": device, "dtype": self.sizes.dtype}
        return {
            "keys": torch.zeros(batch_size, 1, 0, self.width, **make),
            "tokens": torch.zeros(batch_size, 1, 0, 1, dtype=torch.long, device=device),
            "count": torch.zeros(batch_size, dtype=torch.long, device=device),
            "last": torch.zeros(batch_size, self.width, **make),
            "waits": torch.zeros(batch_size, dtype=torch.bool, device=device),
        }

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        if state:
            yield state["tokens"], 0, self.sizes.vocab_size - 1
            most = ring.most_counted(state["keys"].shape[2], self.config.cache_size)
            yield state["count"], 0, most
            yield state["count"], *[(tokens - 1).clamp_min(0) for tokens in progress.closed]

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        keys = tokens.ffn if self.config.key == "ffn" else tokens.hidden
        if keys is None or tokens.ids is None or not keys.shape[1]:
            return state
        size = self.config.cache_size
        valid = tokens.valid.to(keys.device)
        order = (~valid).to(torch.int8).argsort(dim=1, stable=True)  # a row's tokens first
        keys, ids = take(keys.to(self.sizes.dtype), order), tokens.ids.gather(1, order)
        count = valid.sum(1)
        place = torch.arange(keys.shape[1] + 1, device=keys.device)
        # The key that waits and those of the segment, each with the token behind it.
        behind = torch.nn.functional.pad(ids, (0, 1), value=-1)
        known = (place < count[:, None]) & (behind >= 0)
        known &= (place > 0) | state["waits"][:, None]
        entries = torch.cat([state["last"][:, None], keys], 1)
        total = state["count"] + known.sum(1)
        at = ring.slots(state["count"], known, size)
        capacity = ring.capacity(total, state["keys"].shape[2], size)
        some = count > 0
        last = take(keys, (count - 1).clamp_min(0)[:, None])[:, 0]
        return {
            "keys": ring.store(state["keys"], at, entries[:, None], capacity),
            "tokens": ring.store(state["tokens"], at, behind[:, None, :, None], capacity),
            "count": total,
            "last": torch.where(some[:, None], last, state["last"]),
            "waits": some | state["waits"],
        }

    # Mixing

    def mix(self, logits: Tensor, key: Tensor, state: Tree) -> Tensor:
        store = self.store  # which may be exchanged while it is searched
        answers = [f for f in (self._in_store(store, key), self._in_state(key, state)) if f]
        if not answers:
            return logits
        costs = torch.cat([c.to(logits.dtype) for c, _ in answers], -1)
        tokens = torch.cat([t for _, t in answers], -1)
        if len(answers) > 1:
            costs, order = costs.sort(-1)
            costs = costs[..., : self.config.top_k]
            tokens = tokens.gather(-1, order)[..., : self.config.top_k]
        return interpolate(logits, costs, tokens, *self._settings(store, costs))

    def settings(self, costs: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Compute lambda and temperature for neighbours at `costs` `(..., K)`: numbers or
        `(..., 1)`."""
        return self._settings(self.store, costs)

    def _settings(
        self, store: Store | None, costs: Tensor
    ) -> tuple[Tensor | float, Tensor | float]:
        tuned = {} if store is None else store.notes.get("tuned", {})
        config = self.config

        def given(name: str, otherwise: float | None) -> Any:
            value = getattr(config, name)
            return tuned.get(name, otherwise) if value is None else value

        weight, temperature = given("interpolation", WEIGHT), given("temperature", TEMPERATURE)
        if not config.adaptive:
            return weight, temperature
        return adapt(costs, weight, temperature, given("distance_scale", None))

    def _in_store(self, store: Store | None, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Search the store: costs and next tokens `(B, T, k)` of the neighbours."""
        if store is None or not len(store):
            return None
        answer = store.search(hidden.detach().flatten(0, 1), self.config.top_k)
        values = torch.from_numpy(store.entries(answer.ids).values.astype("int64"))
        if values.numel() and int(values.max()) >= self.sizes.vocab_size:
            raise ValueError(
                f"The store holds the id {int(values.max())}, the model has "
                f"{self.sizes.vocab_size} ids: it was built with another tokenizer, or is damaged."
            )
        costs = answer.scores if self.config.metric == "l2" else -answer.scores
        costs = costs.masked_fill((values < 0).to(costs.device), torch.inf)  # no token behind it
        shape = (*hidden.shape[:2], -1)
        return costs.view(shape), values.to(hidden.device).view(shape)

    def _in_state(self, hidden: Tensor, state: Tree) -> tuple[Tensor, Tensor] | None:
        """Search the text read so far, as `_in_store` does the store; differentiable in both."""
        if not state or not state["keys"].shape[2]:
            return None
        keys, tokens = state["keys"][:, 0], state["tokens"][:, 0, :, 0]
        full = filled(state["count"], keys.shape[1])
        k = min(self.config.top_k, keys.shape[1])
        scores, places = neighbours.nearest(
            hidden.to(keys.dtype), keys, k, self.config.metric, full
        )
        tokens = tokens.gather(1, places.clamp_min(0).flatten(1)).view_as(places)
        return (scores if self.config.metric == "l2" else -scores), tokens


def _followed(folder: Path, named: str, mark: str) -> Path:
    """Open the store that a saved model's config names, if this user wrote it there.

    Raises:
        ValueError: for a server, and for another path outside the model's folder.
    """
    if not is_url(named):
        if is_own(named, mark):
            return Path(named)
        if (folder / named).is_dir():
            return inside(folder, named)
    raise ValueError(
        f"The model in {folder.name} names the store {without_password(named)[:200]!r}, which "
        "memwrap.load follows only if you name it: store=..., or store=False for none."
    )


def adapt(
    costs: Tensor, weight: float, temperature: float, scale: float | None
) -> tuple[Tensor | float, Tensor]:
    """Compute lambda and temperature that follow the distances `(..., K)`; see
    `KnnLMConfig.adaptive`."""
    known = costs.detach()
    finite = known.isfinite()
    mean = known.masked_fill(~finite, 0).sum(-1, keepdim=True) / finite.sum(-1, keepdim=True).clamp(
        1
    )
    heat = temperature * mean.clamp_min(1e-9)
    if scale is None:
        return weight, heat
    return weight * torch.exp(-known.amin(-1, keepdim=True) / scale), heat
