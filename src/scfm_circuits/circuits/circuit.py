"""A circuit: its nodes, edges and expansions, and its tables."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, SupportsFloat, SupportsInt

import pandas as pd

Kind = Literal["feature", "head", "embedding", "error", "logit"]


class Node(NamedTuple):
    """A node of a circuit, made by `of_feature`, `of_head` and so on, which also name it.

    layer: -1 for embeddings. position: the token at which it writes; source: the token it read (a
    head's source, else the position itself).
    index: feature or head number, token of an embedding or a logit, else -1, as for the embedding
    of a position. value: a feature's activation (the target's pre-activation), a head's
    contribution to its reader, or the norm of an error or an embedding.
    """

    id: str
    kind: Kind
    layer: int
    position: int
    source: int
    index: int  # type: ignore[assignment]  # a tuple has a method of this name, not used here
    value: float

    @classmethod
    def of_feature(cls, layer: int, feature: int, position: int, value: SupportsFloat) -> "Node":
        """A feature at a token. value: its activation, or a target's pre-activation."""
        return cls(f"L{layer}_F{feature}_P{position}", "feature", layer, position, position,
                   feature, float(value))

    @classmethod
    def of_head(cls, layer: int, head: int, position: int, source: int, reader: str, value: float
                ) -> "Node":
        """What a head carries from `source`. That depends on who reads it, so the reader's id is
        part of its name. value: its contribution to the reader."""
        return cls(f"A{layer}.{head}_P{position}_from_P{source}_for_{reader}", "head", layer,
                   position, source, head, value)

    @classmethod
    def of_error(cls, layer: int, position: int, norm: SupportsFloat) -> "Node":
        """What a transcoder does not explain at a token."""
        return cls(f"err_L{layer}_P{position}", "error", layer, position, position, -1, float(norm))

    @classmethod
    def of_embedding(cls, token: SupportsInt, position: int, norm: SupportsFloat) -> "Node":
        """The embedding of the token (its id) at a position."""
        return cls(f"E_P{position}", "embedding", -1, position, position, int(token), float(norm))

    @classmethod
    def of_rank(cls, position: int, norm: SupportsFloat) -> "Node":
        """The embedding of a position: of a cell's genes, which rank."""
        return cls(f"R_P{position}", "embedding", -1, position, position, -1, float(norm))

    @classmethod
    def of_state(cls, position: int, n_layers: int, value: SupportsFloat) -> "Node":
        """Where a circuit of a direction between states ends, above the model's last layer; it has
        no token, and is drawn at `position`."""
        return cls(f"state_P{position}", "logit", n_layers, position, position, -1, float(value))

    @classmethod
    def of_logit(cls, token: int, position: int, n_layers: int, value: SupportsFloat) -> "Node":
        """The logit of a token (its id) at a position, above the model's last layer."""
        return cls(f"logit_{token}_P{position}", "logit", n_layers, position, position, token,
                   float(value))


class Edge(NamedTuple):
    """`source` contributes `weight` to the value of `target`, in units of that value."""

    source: str
    target: str
    weight: float


class Expansion(NamedTuple):
    """How a node's value adds up: kept edges, biases, and the parts that were not kept."""

    node: str
    value: float
    kept: float
    constant: float
    rest_features: float
    rest_heads: float
    rest_errors: float
    rest_embedding: float
    absolute: float

    @property
    def residual(self) -> float:
        """What is missing between the parts and the value; rounding only."""
        return (self.kept + self.constant + self.rest_features + self.rest_heads
                + self.rest_errors + self.rest_embedding - self.value)


@dataclass
class Circuit:
    """Nodes by id (the target first), signed edges, and the expansions that prove them."""

    target: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    expansions: dict[str, Expansion] = field(default_factory=dict)

    @property
    def closure_max_relative(self) -> float:
        """Largest |residual| over the sum of absolute contributions, among expanded nodes."""
        return max((abs(one.residual) / max(one.absolute, 1e-30)
                    for one in self.expansions.values()), default=0.0)

    def influence(self, *, signed: bool = False) -> dict[str, float]:
        """Share of the target's absolute contributions that passes through each node.

        An edge passes on |weight| / (sum of all absolute contributions, kept or not, and of the
        constant) of its target's influence; the target has 1. What a constant takes ends there.
        signed: weight in place of |weight|, so that the signs along each path are multiplied.
        """
        incoming: dict[str, list[Edge]] = {}
        for edge in self.edges:
            incoming.setdefault(edge.target, []).append(edge)
        result = dict.fromkeys(self.nodes, 0.0)
        result[self.target] = 1.0
        for node in sorted(self.nodes.values(), key=_height, reverse=True):
            for edge in incoming.get(node.id, []):
                share = self.share(edge)
                if signed and edge.weight < 0:
                    share = -share
                result[edge.source] += share * result[node.id]
        return result

    @property
    def features(self) -> list[Node]:
        """The features' nodes, without the target."""
        return [node for node in self.nodes.values()
                if node.kind == "feature" and node.id != self.target]

    def share(self, edge: Edge) -> float:
        """|weight| over all absolute contributions to the edge's target."""
        return abs(edge.weight) / max(self.expansions[edge.target].absolute, 1e-30)

    def carried(self) -> list[float]:
        """What each edge carries: its share times its target's influence.

        Edges into different nodes have different units; this puts them into shares of the target.
        """
        influence = self.influence()
        return [self.share(edge) * influence[edge.target] for edge in self.edges]


def _height(node: Node) -> float:
    """Order in which the forward pass computes nodes: an edge always goes upwards."""
    step = {"embedding": -1.0, "head": 2.0 * node.layer, "error": 2.0 * node.layer + 1,
            "feature": 2.0 * node.layer + 1, "logit": float("inf")}
    return step[node.kind]


def node_table(circuit: Circuit, texts: list[str], genes: list[str | None]) -> pd.DataFrame:
    """One row per node, most influential first.

    texts, genes: (n_pos,) token texts and the gene of each token (None outside genes). A head
    counts for the token it read, every other node for the token it stands on. The embedding of a
    position is of kind `rank`.
    """
    influence = circuit.influence()
    rows = [{
        "kind": "rank" if node.kind == "embedding" and node.index < 0 else node.kind,
        "layer": node.layer,
        "feature": node.index if node.kind == "feature" else None,
        "head": node.index if node.kind == "head" else None,
        "position": node.position, "source": node.source, "token": texts[node.source],
        "gene": genes[node.source] or "", "value": node.value, "influence": influence[node.id],
        "expanded": node.id in circuit.expansions, "node": node.id,
    } for node in circuit.nodes.values()]
    frame = pd.DataFrame(rows)
    frame["feature"] = frame["feature"].astype("Int64")
    frame["head"] = frame["head"].astype("Int64")
    return frame.sort_values(["influence", "node"], ascending=[False, True], ignore_index=True)


def edge_table(circuit: Circuit) -> pd.DataFrame:
    """One row per edge: source, target, weight, share of the target's absolute contributions."""
    frame = pd.DataFrame(circuit.edges, columns=["source", "target", "weight"])
    frame["share"] = [circuit.share(edge) for edge in circuit.edges]
    return frame


def expansion_table(circuit: Circuit) -> pd.DataFrame:
    """One row per extended node: its value, how it adds up, and the rounding left."""
    frame = pd.DataFrame(circuit.expansions.values(), columns=list(Expansion._fields))
    frame["residual"] = [one.residual for one in circuit.expansions.values()]
    return frame


def circuit_genes(nodes: pd.DataFrame) -> list[str]:
    """Genes on whose tokens nodes stand, by their nodes' summed influence (paper: 9 genes)."""
    return gene_table(nodes)["gene"].tolist()


def gene_table(nodes: pd.DataFrame) -> pd.DataFrame:
    """`node_table` by the gene on whose tokens nodes stand: gene, nodes, influence (summed)."""
    rows = nodes[nodes["gene"] != ""].groupby("gene").agg(
        nodes=("influence", "size"), influence=("influence", "sum")).reset_index()
    return rows.sort_values("influence", ascending=False, kind="stable", ignore_index=True)


def share_kept(circuit: Circuit) -> float:
    """Share of the target's absolute contributions that its direct edges hold."""
    edges = edge_table(circuit).query("target == @circuit.target")
    return float(abs(edges["weight"]).sum() / circuit.expansions[circuit.target].absolute)
