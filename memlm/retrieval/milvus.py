"""Chunks kept by Milvus: in a file through Milvus Lite, or by a cluster at its address.

The client is the same for both. What this module sends in a filter is hexadecimal throughout: a chunk's key
is the hash of its id, and its metadata is kept once as it is and once as tags, which are hashes of key and
value. So no id, key or value can be read as a part of Milvus's filter language, and equality means what it
means in memory. Texts are cut into words here, so that BM25 counts the same words in both stores.

Milvus is written to in messages: an `add` that fails in the middle may leave some of its chunks there. The
client does not survive `fork()`; open the index in the worker. While a file is open, Milvus Lite listens on
a port of this machine without a password, and no other process can open the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from memlm.retrieval import store
from memlm.retrieval.arguments import ABSENT, Absent, ChunkEntry, Value, check_id
from memlm.retrieval.chunk_store import ChunkStore, Matches, StoreAddress, StoreSettings, Where
from memlm.retrieval.codes import Floats
from memlm.retrieval.lexical import words

# Limits of Milvus: bytes of a text, entries of an array, hits of a search.
MAX_BYTES = 65_535
MAX_TAGS = 4096
MAX_HITS = 16_384
# What one message carries, far below Milvus's limit of 64 MB.
MESSAGE_BYTES = 8 << 20
MESSAGE_KEYS = 1000
TIMEOUT = 30.0  # seconds
# A token is for one address: a directory from a stranger may name any other.
ADDRESS_VARIABLE = "MEMLM_STORE"
TOKEN_VARIABLE = "MEMLM_STORE_TOKEN"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_PROPERTY = "memlm.settings"

_Key = tuple[int, str]  # order of adding, hash of the id


@dataclass(frozen=True)
class MilvusStore:
    """Where Milvus keeps the chunks of an index; one collection is one index.

    address: a file that ends in ".db" (Milvus Lite), or http(s)://host:port of a cluster. token:
    "user:password" or a key, never saved; None takes that of the environment's MEMLM_STORE_TOKEN if
    MEMLM_STORE is this address. index_type: Milvus's own, for a collection that is made; None is FLAT in a
    file and AUTOINDEX in a cluster.
    """

    address: str
    collection: str = "memlm"
    index_type: str | None = None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit("" if self.is_file else self.address)
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "store's address holds more than scheme, host, port and database, and addresses are saved; "
                f"give a password as MilvusStore(token=...), or in {TOKEN_VARIABLE}"
            )
        # pymilvus takes whatever ends in .db for a file.
        remote = parts.scheme in ("http", "https") and parts.hostname and parts.path[-3:] != ".db"
        if not self.is_file and not remote:
            raise ValueError(
                f"store={self.address!r} is neither a file that ends in .db nor an address; give "
                "'chunks.db' or 'http://host:19530'"
            )
        if not _NAME.fullmatch(self.collection):
            raise ValueError(
                f"collection={self.collection!r} is no name for Milvus; use letters, digits and _"
            )

    @property
    def is_file(self) -> bool:
        """Whether Milvus Lite keeps the chunks, in this process."""
        return "://" not in self.address and self.address.endswith(".db")

    def open(self, settings: StoreSettings, create: bool) -> MilvusChunks:
        """The collection, made where there is none if `create`. ValueError when it has other settings.

        ImportError without pymilvus, ConnectionError when nobody answers.
        """
        if self.is_file and not create and not os.path.exists(self.address):
            raise ValueError(
                f"store={self.address!r} is not there; put the file back, or give store="
            )
        chunks = MilvusChunks(self, settings)
        chunks.open(create)
        return chunks


def address_of(
    given: str | os.PathLike[str] | StoreAddress, saved: dict[str, Any] | None = None
) -> StoreAddress:
    """Where a store is: of a text or path, Milvus there.

    saved: the place in a manifest; a text or path stands for its address alone, and leaves its collection.
    """
    if isinstance(given, str | os.PathLike):
        if saved is None:
            return MilvusStore(os.fspath(given))
        return MilvusStore(os.fspath(given), saved_address(saved).collection)
    if not callable(getattr(given, "open", None)):
        raise TypeError(f"store is of type {type(given).__name__}; give an address or MilvusStore")
    return given


def saved_address(place: dict[str, Any]) -> MilvusStore:
    """The address that a manifest holds. ValueError when it is none."""
    if place.get("kind") != "milvus" or not isinstance(place.get("address"), str):
        raise ValueError(f"store={place!r} is of no kind this memlm knows; upgrade memlm")
    return MilvusStore(place["address"], str(place.get("collection")))


class MilvusChunks(ChunkStore):
    """A collection of Milvus. Its count, ids and hits are asked for every time: others may write to it."""

    precision = "float32"
    outlives_process = True

    def __init__(self, place: MilvusStore, settings: StoreSettings) -> None:
        self._place = place
        self._settings = settings
        self._last = 0
        self.factory = place.index_type or ("FLAT" if place.is_file else "AUTOINDEX")
        try:
            from pymilvus import MilvusClient
            from pymilvus.exceptions import MilvusException
        except ImportError as error:
            raise ImportError(
                f"store={place.address!r} needs pymilvus; pip install 'memlm[milvus]'"
            ) from error
        self._refusal = MilvusException
        token = place.token
        if token is None and os.environ.get(ADDRESS_VARIABLE) == place.address:
            token = os.environ.get(TOKEN_VARIABLE)
        where = os.path.abspath(place.address) if place.is_file else place.address
        try:
            self._client = MilvusClient(uri=where, token=token or "", timeout=TIMEOUT)
        except MilvusException as error:
            raise ConnectionError(
                f"store={place.address!r} cannot be opened ({_reason(error)}); "
                + (
                    "install milvus-lite, and close the process that has the file open"
                    if place.is_file
                    else "start Milvus there, or give the right address and token"
                )
            ) from error

    # --- the collection

    def open(self, create: bool) -> None:
        """Make the collection if it is not there, and check that it is for these settings."""
        if not self._call("has_collection"):
            if not create:
                raise ValueError(
                    f"store={self._place.address!r} holds no collection {self._place.collection!r}; "
                    "restore it, or build the index again"
                )
            self._create()
        there = self._call("describe_collection")
        # Milvus Lite does not keep descriptions.
        kept = there.get("description") or there.get("properties", {}).get(_PROPERTY) or ""
        try:
            found = StoreSettings(**json.loads(kept))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"collection={self._place.collection!r} at {self._place.address!r} was not made by memlm; "
                "give another name"
            ) from error
        for name, mine in asdict(self._settings).items():
            if getattr(found, name) != mine:
                raise ValueError(
                    f"{name}={mine!r}, but collection {self._place.collection!r} at "
                    f"{self._place.address!r} was made with {getattr(found, name)!r}; "
                    "give the same, or another collection"
                )
        self._call("load_collection")

    def _create(self) -> None:
        from pymilvus import DataType, Function, FunctionType, MilvusClient

        described = json.dumps(asdict(self._settings), sort_keys=True)
        schema = MilvusClient.create_schema(
            auto_id=False, enable_dynamic_field=False, description=described
        )
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("row", DataType.INT64)
        for name in ("id", "text", "metadata"):
            schema.add_field(name, DataType.VARCHAR, max_length=MAX_BYTES)
        schema.add_field(
            "tags",
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=MAX_TAGS,
            max_length=32,
        )
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self._settings.dim)
        indexes = self._client.prepare_index_params()
        indexes.add_index("vector", index_type=self.factory, metric_type="IP")
        if not self._place.is_file:  # Milvus Lite has no index of arrays.
            indexes.add_index("tags", index_type="INVERTED")
        if self._settings.hybrid:
            schema.add_field(
                "words",
                DataType.VARCHAR,
                max_length=MAX_BYTES,
                enable_analyzer=True,
                analyzer_params={"tokenizer": "standard"},
            )
            schema.add_field("counts", DataType.SPARSE_FLOAT_VECTOR)
            schema.add_function(
                Function("bm25", FunctionType.BM25, ["words"], ["counts"], "words of the text")
            )
            indexes.add_index("counts", index_type="SPARSE_INVERTED_INDEX", metric_type="BM25")
        self._call(
            "create_collection",
            schema=schema,
            index_params=indexes,
            # What was added is found by the next search, whoever searches.
            consistency_level="Strong",
            properties={_PROPERTY: described} if self._place.is_file else None,
        )

    def _call(self, name: str, **arguments: Any) -> Any:
        """A method of the client. ConnectionError when Milvus refuses it or does not answer."""
        try:
            return getattr(self._client, name)(self._place.collection, **arguments)
        except self._refusal as error:
            raise ConnectionError(
                f"Milvus at {self._place.address!r} did not do {name} ({_reason(error)}); "
                "see whether it is up and the token allows it"
            ) from error

    def __len__(self) -> int:
        return int(self._call("query", filter="", output_fields=["count(*)"])[0]["count(*)"])

    @property
    def untouched(self) -> bool:
        return False

    def info(self) -> dict[str, Any]:
        return {
            "store": self._place.address,
            "collection": self._place.collection,
            "trained": True,
            # Not known here: Milvus does not say.
            "bytes": {},
        }

    # --- chunks

    def new_ids(self, count: int) -> list[str]:
        # Not numbered: other processes may add at the same time.
        return [check_id(f"chunk-{uuid.uuid4().hex}", "id") for _ in range(count)]

    def find(self, ids: Sequence[str]) -> dict[str, _Key]:
        name_of = {_hash(name): name for name in ids}
        found = self._rows(list(name_of), ["row"])
        return {name: (found[key]["row"], key) for key, name in name_of.items() if key in found}

    def entries(self, keys: Sequence[_Key]) -> list[ChunkEntry | None]:
        found = self._rows(list({key for _, key in keys}), ["id", "text", "metadata"])
        rows = (found.get(key) for _, key in keys)
        return [(row["id"], row["text"], row["metadata"]) if row else None for row in rows]

    def _rows(self, keys: list[str], fields: list[str]) -> dict[str, dict[str, Any]]:
        """Fields of the chunks with these hashes, those that are there."""
        found = {}
        for some in _in_parts(keys):
            for row in self._call(
                "query", filter=_among("key", some), output_fields=["key", *fields]
            ):
                found[row["key"]] = row
        return found

    def put(self, entries: Sequence[ChunkEntry], vectors: Floats) -> None:
        rows = [self._row(n, entry) for n, entry in enumerate(entries)]
        # Ascending over processes, too, as far as their clocks agree.
        self._last = max(self._last + 1, time.time_ns())
        for row, vector in zip(rows, vectors.tolist(), strict=True):
            row["row"], row["vector"] = self._last, vector
            self._last += 1
        message: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            own = 4 * self._settings.dim + 3 * len(row["text"]) + 64 * len(row["tags"])
            if message and size + own > MESSAGE_BYTES:
                self._call("upsert", data=message)
                message, size = [], 0
            message.append(row)
            size += own
        if message:
            self._call("upsert", data=message)

    def _row(self, number: int, entry: ChunkEntry) -> dict[str, Any]:
        """A chunk's fields but for its vector. ValueError when one is too long for Milvus."""
        ident, text, notes = entry
        row = {"key": _hash(ident), "id": ident, "text": text, "metadata": notes}
        if self._settings.hybrid:
            row["words"] = " ".join(words(text))
        for name, value in row.items():
            if len(value.encode()) > MAX_BYTES:
                raise ValueError(
                    f"text {number}: its {name} has {len(value.encode()):,} bytes, and Milvus keeps at "
                    f"most {MAX_BYTES:,}; make it shorter (`chunk_text` cuts texts)"
                )
        metadata = json.loads(notes) if notes else {}
        tags = {tag for key, value in metadata.items() for tag in (_tag(key), _tag(key, value))}
        if len(tags) > MAX_TAGS:
            raise ValueError(
                f"text {number}: its metadata has {len(metadata):,} keys, and Milvus keeps at most "
                f"{MAX_TAGS // 2:,}; give fewer"
            )
        return {**row, "tags": sorted(tags)}

    def remove(self, keys: Sequence[_Key]) -> None:
        for some in _in_parts([key for _, key in keys]):
            self._call("delete", filter=_among("key", some))

    # --- search

    def search(
        self, vectors: Floats, queries: Sequence[str] | None, k: int, where: Where
    ) -> tuple[Matches, Matches]:
        if k > MAX_HITS:
            raise ValueError(
                f"k wants {k:,} hits (twice k in a hybrid search), and Milvus gives at most {MAX_HITS:,}; "
                "give a smaller k"
            )
        allowed = _filter(where)
        if allowed is None:
            return [[] for _ in vectors], [[] for _ in queries or ()]
        dense = self._matches("vector", "IP", vectors.tolist(), k, allowed)
        asked = [" ".join(dict.fromkeys(words(query))) for query in queries or ()]
        found = iter(self._matches("counts", "BM25", [q for q in asked if q], k, allowed))
        return dense, [next(found) if q else [] for q in asked]

    def _matches(self, name: str, metric: str, data: list[Any], k: int, allowed: str) -> Matches:
        """Per entry of `data` the k best by the field `name`; equal scores in order of adding."""
        if not data:
            return []
        found = self._call(
            "search",
            data=data,
            anns_field=name,
            limit=k,
            filter=allowed,
            output_fields=["row"],
            search_params={"metric_type": metric},
        )
        # Milvus Lite gives BM25 with a minus sign; a cluster does not.
        sign = abs if metric == "BM25" else float
        lines = [
            [((hit["entity"]["row"], hit["key"]), sign(hit["distance"])) for hit in hits]
            for hits in found
        ]
        return [sorted(line, key=lambda match: (-match[1], match[0])) for line in lines]

    # --- the rest

    def check_trainable(self, count: int) -> None:
        raise ValueError("an index with store= needs no training by its caller; leave train out")

    def train(self, vectors: Floats) -> None:
        self.check_trainable(len(vectors))

    def compact(self) -> None:
        self._call("compact")

    def save(self, directory: Path, settings: dict[str, Any]) -> None:
        address = self._place.address
        place = {
            "kind": "milvus",
            "address": os.path.abspath(address) if self._place.is_file else address,
            "collection": self._place.collection,
        }
        store.save_place(directory, settings, place)


def _reason(error: Exception) -> str:
    return str(getattr(error, "message", "") or error).strip().rstrip(".")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tag(key: str, value: Value | Absent = ABSENT) -> str:
    """The tag of chunks whose metadata has that value; of those that have the key for ABSENT."""
    if value is ABSENT:
        return _hash(json.dumps([key]))
    # 1 and 1.0 are the same, and neither is True.
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    return _hash(json.dumps([key, plain]))


def _filter(where: Where) -> str | None:
    """A filter in Milvus's language, "" for all chunks; None when it lets none through."""
    clauses = []
    for key, values in where.items():
        tags = [_tag(key, value) for value in values if value is not ABSENT]
        either = [f"array_contains_any(tags, {json.dumps(tags)})"] if tags else []
        if any(value is ABSENT for value in values):
            either.append(f'not array_contains(tags, "{_tag(key)}")')
        if not either:
            return None
        clauses.append(f"({' or '.join(either)})")
    return " and ".join(clauses)


def _among(name: str, keys: list[str]) -> str:
    return f"{name} in {json.dumps(keys)}"


def _in_parts(keys: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(keys), MESSAGE_KEYS):
        yield keys[start : start + MESSAGE_KEYS]
